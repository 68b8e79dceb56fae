"""`load_model`: a Hugging Face decoder with its tokenizer and the map of its parts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..checks import typed
from ..world.store import SHIPPED, WORLD
from .device import device_named, dtype_named
from .families import ModuleMap, device_of
from .precision import TF32Within
from .pretrained import load_pretrained
from .wrappers import unwrapped


@dataclass
class Shared:
    """What all `EditableModel`s of one Hugging Face model have in common.

    applied_edits: those whose changes are in the weights, oldest first. layer_arguments: what the model passes to its
    layers beside the hidden state, for prompts of one length. resting: whether it is within `hooks.resting`.
    alone: held there, so that threads take turns.
    """

    applied_edits: list[Any] = field(default_factory=list)
    layer_arguments: dict[Any, Any] = field(default_factory=dict)
    resting: bool = False
    alone: Any = field(default_factory=RLock)


_SHARED: WeakKeyDictionary[nn.Module, Shared] = WeakKeyDictionary()


class EditableModel:
    """A Hugging Face decoder (`hf`), its tokenizer, and where it keeps things (`modules`).

    The Hugging Face module is the model: nothing is re-implemented, no weight is copied. It is put in eval mode. Of a
    wrapped model (torch.compile, DataParallel, a PEFT model with LoRA) `hf` is the Hugging Face model inside; the
    wrapper shares its weights, so that it says what `hf` says.
    `name`: the hub's, or the last component of a folder's path: files that are passed on tell no local path.
    `bos`: True puts the tokenizer's beginning-of-sequence token in front of every prompt, False leaves all special
    tokens out, None does what the tokenizer does by itself. One that a text begins with itself is not doubled.
    `precision`: see `load_model`.
    """

    made_by = "knowedit_ext.load_model(name, folder or (hf_model, tokenizer))"

    def __init__(
        self,
        hf: nn.Module,
        tokenizer: Any,
        *,
        bos: bool | None = None,
        name: str | None = None,
        precision: str | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer (use_fast=True), "
                "token spans are found by offset mapping"
            )
        if bos and tokenizer.bos_token_id is None:
            raise ValueError("bos=True, but the tokenizer has no beginning-of-sequence token")
        if precision not in (None, "tf32"):
            raise ValueError(f"unknown precision '{precision}': expected 'tf32', or None for exact float32")
        hf = unwrapped(hf)
        self.modules = ModuleMap(hf)
        _check_in_memory(self.modules)
        _check_vocabulary(tokenizer, self.modules.embedding.weight.shape[0])
        self.hf = hf.eval()
        self.tokenizer = tokenizer
        self.bos = bos
        self.precision = precision
        self.probed = False  # whether a sweep was seen to give what the model does, see sweep/probe.py
        if precision == "tf32":
            TF32Within([*self.modules.layers, self.modules.head])
        self.name = public_name(name or getattr(hf.config, "_name_or_path", "")) or type(hf).__name__
        self.shared = _SHARED.setdefault(hf, Shared())
        self.applied_edits, self.layer_arguments = self.shared.applied_edits, self.shared.layer_arguments

    @property
    def num_layers(self) -> int:
        return len(self.modules.layers)

    @property
    def hidden_size(self) -> int:
        return int(self.modules.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def device(self) -> torch.device:
        """Where token ids go: the embedding's device."""
        return device_of(self.modules.embedding)

    def __repr__(self) -> str:
        return f"EditableModel({self.name!r}, {self.modules.model_type}, {self.num_layers} layers, {self.dtype})"


@typed
def load_model(
    model: str | Path | tuple[nn.Module, Any] | EditableModel,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    bos: bool | None = None,
    precision: str | None = None,
    **kwargs: Any,
) -> EditableModel:
    """Load a decoder-only model for tracing and editing.

    model: a hub name, a folder with config, weights and tokenizer, a `.gguf` file (or its folder or hub name with
        `gguf_file=`), "world" (the built-in one, in float32 unless `dtype` says otherwise), `(hf_model, tokenizer)`, or
        what this returned before. Of a model handed over no copy is made: `device` and `dtype` move and convert that
        very object, and edits applied to it are known however often it is handed over. It may be wrapped, see
        `EditableModel`. Config and tokenizer of a GGUF file come from it too; its weights are dequantised, to float32
        unless `dtype` says otherwise, and edits belong to these weights.
    device: e.g. "cpu", "cuda:1"; None leaves the model where it is (or where `device_map` puts it).
    dtype: e.g. "float32", "bfloat16"; None keeps what the checkpoint says.
    bos: see `EditableModel`.
    precision: "tf32" lets the layers and the head of a float32 model multiply in TF32 on CUDA, in forward passes, which
        hooks on the model see to, and for the gradients of values. None: torch's own setting, which is exact float32
        unless you change it. Moments and solves are exact either way.
    kwargs: passed to `AutoModelForCausalLM.from_pretrained` (e.g. `device_map="auto"`, `revision=...`).

    Raises `UnsupportedModelError` for encoder-decoders, unknown architectures, models without a language-model head,
    and wrappers that cannot be taken off (FSDP, adapters other than plain LoRA).
    """
    device, dtype = device_named(device), dtype_named(dtype)
    if isinstance(model, (tuple, EditableModel)) and kwargs:
        raise TypeError(f"{', '.join(kwargs)}: only used when a model is loaded by name or folder")
    if isinstance(model, EditableModel):
        precision = precision or model.precision
        if device is None and dtype is None and bos in (None, model.bos) and precision == model.precision:
            return model
        hf, tokenizer, name, bos = model.hf, model.tokenizer, model.name, model.bos if bos is None else bos
    elif isinstance(model, tuple):
        if len(model) != 2 or not isinstance(model[0], nn.Module):
            kinds = ", ".join(type(part).__name__ for part in model)
            raise TypeError(f"expected (hf_model, tokenizer), got ({kinds})")
        hf, tokenizer = model
        name = None
    elif not isinstance(model, (str, Path)):
        raise TypeError(
            f"cannot load a {type(model).__name__}: expected a hub name, a folder, or (hf_model, tokenizer)"
        )
    else:
        name = str(model)
        folder = name
        if name == WORLD:
            folder, dtype = str(SHIPPED), dtype or torch.float32
        if kwargs.pop("trust_remote_code", False):
            raise ValueError("trust_remote_code is never used: load the model yourself and pass (hf_model, tokenizer)")
        hf, tokenizer = load_pretrained(folder, dtype, **kwargs)
        name = kwargs.get("gguf_file") or name
    if device is not None:
        hf = hf.to(device)
    if dtype is not None:
        hf = hf.to(dtype)
    return EditableModel(hf, tokenizer, bos=bos, name=name, precision=precision)


def _check_in_memory(modules: ModuleMap) -> None:
    """What accelerate has offloaded computes somewhere; a model that was made on the meta device has no numbers."""
    for name, part in (("embedding", modules.embedding), *((f"layer {n}", x) for n, x in enumerate(modules.layers))):
        if device_of(part) == torch.device("meta"):
            raise ValueError(
                f"the model's {name} is on the meta device: it has no weights; load it with from_pretrained, or with "
                "device_map= where it is larger than memory"
            )


def _check_vocabulary(tokenizer: Any, rows: int) -> None:
    """Tokens that were added, special ones often, may lie beyond the embedding (Gemma 3's image token): no text of ours
    has them."""
    if len(tokenizer) <= rows:
        return
    added = tokenizer.get_added_vocab()
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows and token not in added}
    if beyond:
        number = min(beyond)
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows: token {number} "
            f"({beyond[number]!r}) would have none; pass the model's own tokenizer"
        )


def public_name(name: str) -> str:
    """A model's name without the place where somebody keeps it: a folder's last component, a hub cache's repository."""
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", name)
    if cached:
        return cached[1].replace("--", "/")
    path = Path(name)
    if name and (path.is_absolute() or path.suffix == ".gguf" or name.startswith((".", "~")) or path.is_dir()):
        return path.expanduser().resolve().name
    return name
