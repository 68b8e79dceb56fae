"""A model under a change that is still being learnt: its modules put out what the change adds, with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from .editor import Factors


@contextmanager
def edited(modules: Mapping[str, nn.Module], factors: Factors) -> Iterator[None]:
    """Inside, the module of each weight's name computes with the change of its factors, which is never written out."""
    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(partial(_add, *factors[name])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(
    inputs: torch.Tensor, outputs: torch.Tensor, module: nn.Module, args: tuple, out: torch.Tensor
) -> torch.Tensor:
    added = args[0].to(inputs.dtype) @ inputs.T @ outputs
    return (out.to(added.dtype) + added).to(out.dtype)
