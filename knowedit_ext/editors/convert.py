"""Published archives of MEND and KE editors (.pt) as safetensors: read without running what is in them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPTJConfig

from ..runs.files import write_tensors
from .editor import FORMAT


def convert_editor(source: str | Path, target: str | Path) -> dict[str, str]:
    """Write the editor of a released archive to a file that `MEND.load` or `EFK.load` reads; its metadata.

    The archive is what mend's trainer.save_state writes. Of it tensors are read, and one class, the model's config;
    anything else in it is refused. Optimiser states are left out. ValueError for what is no such archive.
    """
    state = _read(Path(source))
    config = state.pop("model_config", None)
    if not isinstance(config, (GPT2Config, GPTJConfig)):
        raise ValueError(f"'{source}' does not say which model it is for: expected 'model_config' of a GPT-2 or GPT-J")
    tensors = {k.replace("gtn.", "mend.", 1) if k.startswith("gtn.") else k: v for k, v in state.items()}
    if odd := [name for name, x in tensors.items() if not isinstance(x, torch.Tensor)]:
        raise ValueError(f"'{source}' holds '{odd[0]}', which is no tensor")
    layers = int(config.n_layer)
    method = "mend" if "edit_lrs" in tensors else "efk"
    inner = _mend_weights(config, layers, tensors) if method == "mend" else _efk_weights(layers, tensors)
    if not inner:
        raise ValueError(f"'{source}' has tensors of no editor of a model with {layers} layers")
    model = {"name": "", "type": config.model_type, "layers": layers, "hidden": int(config.n_embd)}
    about = {"format": FORMAT, "method": method, "inner_params": json.dumps(inner), "model": json.dumps(model)}
    write_tensors(target, tensors, about)
    return about


def _read(source: Path) -> dict[str, Any]:
    if not source.is_file():
        raise FileNotFoundError(f"there is no file '{source}'")
    try:
        with torch.serialization.safe_globals([GPT2Config, GPTJConfig]):
            archive = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"'{source}' is no archive of tensors and a GPT-2's or GPT-J's config: {reason}") from error
    if not isinstance(archive, dict) or not isinstance(archive.get("model"), dict):
        raise ValueError(f"'{source}' has no 'model': expected what mend's trainer saves")
    return dict(archive["model"])


def _mend_weights(config: Any, layers: int, tensors: dict[str, torch.Tensor]) -> list[str]:
    """The names are in the training's config alone (mend, config/model/gpt2xl.yaml, gptj.yaml)."""
    pair = ("fc_in", "fc_out") if config.model_type == "gptj" else ("c_proj", "c_fc")
    edited = len(tensors["edit_lrs"]) // len(pair)
    return [f"transformer.h.{n}.mlp.{part}.weight" for n in range(layers - edited, layers) for part in pair]


def _efk_weights(layers: int, tensors: dict[str, torch.Tensor]) -> list[str]:
    named = {
        f"editor.conditioners.transformer_h_{n}_mlp_{part}_weight_conditioner.": f"transformer.h.{n}.mlp.{part}.weight"
        for n in range(layers)
        for part in ("c_fc", "c_proj", "fc_in", "fc_out")
    }
    return [name for prefix, name in named.items() if any(key.startswith(prefix) for key in tensors)]
