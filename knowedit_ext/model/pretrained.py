"""A Hugging Face checkpoint with its tokenizer, whole, or a ValueError that names it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers import __version__ as version

from ..checks import quoted
from ..extras import require
from .families import refuse_unsupported

GGUF = ".gguf"


def load_pretrained(name: str, dtype: torch.dtype | None, **kwargs: Any) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a hub name, a folder or a GGUF file; kwargs: for `AutoModelForCausalLM.from_pretrained`,
    `gguf_file` among them. Config and tokenizer of a GGUF file come from it too; its weights are dequantised, to
    float32 where no dtype is asked for.

    ValueError for a folder that is not there or no checkpoint, a name that cannot be reached, damaged files, and for
    weights that the checkpoint lacks, which would be random numbers.
    """
    if os.path.isfile(name) and "gguf_file" not in kwargs and name.lower().endswith(GGUF):
        kwargs["gguf_file"] = os.path.basename(name)
        name = os.path.dirname(name) or "."
    gguf = kwargs.get("gguf_file")
    if gguf is not None:
        require("gguf")
        dtype = dtype or torch.float32
    _check_folder(name, gguf)
    where = os.path.join(name, gguf) if gguf is not None and os.path.isdir(name) else name
    from_hub = ("revision", "cache_dir", "token", "local_files_only", "gguf_file")
    hub = {k: kwargs[k] for k in from_hub if k in kwargs}
    with _named(where, "config.json"):
        config = AutoConfig.from_pretrained(name, **hub)
    refuse_unsupported(config)
    with _named(where, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(f"the tokenizer of '{name}' has no words: are its files (tokenizer.json, ...) there?")
    kwargs |= {"dtype": dtype} if dtype is not None else {}
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        # "sdpa" has no such cap, and older transformers do not say so.
        kwargs.setdefault("attn_implementation", "eager")
    with _named(where, "weights"):
        hf, loading_info = auto_class(config).from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    _check_weights(where, loading_info)
    if gguf is not None:
        _forget_quantisation(hf)
    return hf, tokenizer


def _forget_quantisation(hf: nn.Module) -> None:
    """What was read from GGUF is a model of plain weights; transformers marks it as quantised all the same."""
    for name, value in (("hf_quantizer", None), ("is_quantized", False)):
        if hasattr(hf, name):
            setattr(hf, name, value)
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config


def auto_class(config: PretrainedConfig) -> type:
    """What loads a decoder of this config: containers whose text part is one are no causal models to transformers."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def _check_weights(name: str, loading_info: Mapping[str, Any]) -> None:
    """Weights that were not read are random numbers, which transformers only warns of."""
    wrong = [f"lacks {key}" for key in sorted(loading_info["missing_keys"])]
    wrong += [
        f"has {key} as {list(there)}, not {list(wanted)} as its config.json says"
        for key, there, wanted in sorted(loading_info["mismatched_keys"])
    ]
    if wrong:
        more = f" (and {len(wrong) - 2} more weights)" if len(wrong) > 2 else ""
        raise ValueError(f"the checkpoint '{name}' {', '.join(wrong[:2])}{more}: it is damaged, or of another model")


def _check_folder(name: str, gguf: str | None = None) -> None:
    if not name.strip():
        raise ValueError("the model's name is empty: expected a folder or a name on the Hugging Face hub")
    if os.path.isdir(name) and gguf is not None:
        _check_gguf(Path(name) / gguf)
    elif os.path.isdir(name):  # False for what no path can be, where `Path` raises
        _check_config(Path(name) / "config.json")
    elif os.path.exists(name):
        raise ValueError(
            f"{quoted(name)} is a file: expected the folder of a Hugging Face model, or a name on its hub (or a file "
            f"called ...{GGUF})"
        )
    elif name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name:
        raise ValueError(f"there is no folder {quoted(name)}")


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"there is no file '{path}'")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"'{path}' is no GGUF file: it does not begin with 'GGUF'")


def _check_config(path: Path) -> None:
    """transformers looks on its hub for what it cannot read here, and then speaks of the connection."""
    if not path.is_file():
        raise ValueError(f"the folder '{path.parent}' holds no model: there is no config.json in it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}") from error
    known = CONFIG_MAPPING.keys()
    if not isinstance(config, dict) or config.get("model_type") not in known:
        content = f"the model type {config.get('model_type')!r}" if isinstance(config, dict) else "no object"
        raise ValueError(f"'{path}' holds {content}, which the installed transformers ({version}) does not know")


@contextmanager
def _named(name: str, part: str) -> Iterator[None]:
    """What a library says about a checkpoint's files, short and with the checkpoint's name."""
    try:
        yield
    except (TypeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, ImportError):
            if not isinstance(error.__context__, (ValueError, OSError)):
                raise
            error = error.__context__  # older transformers ask for protobuf whatever is wrong with a tokenizer
        reason = shorten(str(error) or type(error).__name__, 240, placeholder=" ...")
        if Path(name).exists():
            raise ValueError(f"cannot load the {part} of the model in {quoted(name)}: {reason}") from error
        raise ValueError(
            f"cannot load the {part} of {quoted(name)}, which is no folder here, from the Hugging Face hub: {reason}"
        ) from error
