"""Runs a Hugging Face attention module on packed rows: only the attention function is swapped.

Classes that look their function up in transformers' `AttentionInterface` get ours by name; those whose forward calls
their own `_attn` (GPT-J before transformers 5.24) have it wrapped. Which of the two a class does is read from its
forward. Both read what the layer in progress attends by from a context variable.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from ..model.families import ModuleMap
from ..ops import tree_attention

NAME = "knowedit_tree"


@dataclass
class Attending:
    """The layer in progress: its table (int32 [n, 5], see `tree_attention`) and keys and values of frozen rows.

    frozen: (k, v), [frozen rows, kv_heads, d] each, in front of the layer's own. recorded: filled with the layer's own.
    """

    segments: torch.Tensor
    frozen: tuple[torch.Tensor, torch.Tensor] | None = None
    recorded: tuple[torch.Tensor, torch.Tensor] | None = None


_attending: ContextVar[Attending] = ContextVar("knowedit_attending")


def _attend(
    module: nn.Module,
    query: torch.Tensor,  # [1, heads, rows, d]
    key: torch.Tensor,  # [1, kv_heads, rows, d]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [rows, heads, d]
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    layer = _attending.get()
    layer.recorded = (k, v)
    if layer.frozen is not None:
        k, v = (torch.cat(pair) for pair in zip(layer.frozen, (k, v), strict=True))
    out = tree_attention(q, k, v, layer.segments.to(q.device), scale, sliding_window or 0, softcap or 0.0)
    return out[None], None  # [1, rows, heads, d]


AttentionInterface.register(NAME, _attend)


def _calls_attn(attention: nn.Module) -> bool:
    """Whether the class's own forward calls `self._attn`."""
    return "_attn" in inspect.unwrap(type(attention).forward).__code__.co_names


def _attn_without_interface(module: nn.Module):
    """As GPT-J's `_attn(query, key, value, mask)`: heads first, scale 1 / scale_attn, result [1, heads, rows, d]."""

    def attend(query, key, value, attention_mask=None):
        out, weights = _attend(module, query, key, value, None, scaling=1.0 / float(module.scale_attn))
        return out.transpose(1, 2), weights

    return attend


@contextmanager
def tree_attention_in(modules: ModuleMap) -> Iterator[None]:
    """While open, the model's attention modules attend by the table given to `attending`; then all is as it was."""
    attentions = [modules.attn(layer) for layer in range(len(modules.layers))]
    wrapped: list[nn.Module] = []
    configs: dict[int, tuple[Any, str]] = {}
    try:
        for attention in attentions:
            if _calls_attn(attention):
                attention._attn = _attn_without_interface(attention)
                wrapped.append(attention)
            elif id(attention.config) not in configs:
                configs[id(attention.config)] = (attention.config, attention.config._attn_implementation)
                attention.config._attn_implementation = NAME
        yield
    finally:
        for attention in wrapped:
            del attention._attn
        for config, implementation in configs.values():
            config._attn_implementation = implementation


@contextmanager
def attending(segments: torch.Tensor, frozen: tuple[torch.Tensor, torch.Tensor] | None = None) -> Iterator[Attending]:
    """What the layer that runs inside attends by; holds its keys and values afterwards."""
    layer = Attending(segments, frozen)
    token = _attending.set(layer)
    try:
        yield layer
    finally:
        _attending.reset(token)
