"""`load_model`: a Hugging Face decoder with its tokenizer and the map of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .device import device_named, dtype_named
from .families import ModuleMap, device_of
from .precision import TF32Within
from .pretrained import load_pretrained


class EditableModel:
    """A Hugging Face decoder (`hf`), its tokenizer, and where it keeps things (`modules`).

    The Hugging Face module is the model: nothing is re-implemented, no weight is copied. It is put in eval mode.
    `bos`: True puts the tokenizer's beginning-of-sequence token in front of every prompt, False leaves all special
    tokens out, None does what the tokenizer does by itself. `precision`: see `load_model`.
    """

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
        self.modules = ModuleMap(hf)
        self.hf = hf.eval()
        self.tokenizer = tokenizer
        self.bos = bos
        self.precision = precision
        if precision == "tf32":
            TF32Within([*self.modules.layers, self.modules.head])
        self.name = name or getattr(hf.config, "_name_or_path", "") or type(hf).__name__

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

    model: a hub name, a folder with config, weights and tokenizer, `(hf_model, tokenizer)`, or what this returned
        before. Of a model handed over no copy is made: `device` and `dtype` move and convert that very object.
    device: e.g. "cpu", "cuda:1"; None leaves the model where it is (or where `device_map` puts it).
    dtype: e.g. "float32", "bfloat16"; None keeps what the checkpoint says.
    bos: see `EditableModel`.
    precision: "tf32" lets the layers and the head of a float32 model multiply in TF32 on CUDA, in forward passes; hooks
        on the model do it. None: torch's own setting, which is exact float32 unless you change it. Moments and solves
        are exact either way.
    kwargs: passed to `AutoModelForCausalLM.from_pretrained` (e.g. `device_map="auto"`, `revision=...`).

    Raises `UnsupportedModelError` for encoder-decoders, mixtures of experts and unknown architectures.
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
        hf, tokenizer = model
        name = None
    else:
        name = str(model)
        if kwargs.pop("trust_remote_code", False):
            raise ValueError("trust_remote_code is never used: load the model yourself and pass (hf_model, tokenizer)")
        hf, tokenizer = load_pretrained(name, dtype, **kwargs)
    if device is not None:
        hf = hf.to(device)
    if dtype is not None:
        hf = hf.to(dtype)
    return EditableModel(hf, tokenizer, bos=bos, name=name, precision=precision)
