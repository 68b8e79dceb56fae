"""Activation functions that transformers spells out as many kernels, run as the one kernel that computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers.activations import NewGELUActivation

from ..model.families import ModuleMap

EXACT = (torch.float32, torch.float64)  # in half precision each of the many kernels rounds: that is another function


@contextmanager
def fused_activations(modules: ModuleMap) -> Iterator[None]:
    """While open, "gelu_new" (GPT-2, GPT-J) is one kernel forward and one back, not eight and more."""
    spelled_out = [
        part
        for layer in modules.layers
        for part in layer.modules()
        if type(part) is NewGELUActivation and "forward" not in vars(part)
    ]
    for part in spelled_out:
        part.forward = partial(_tanh_gelu, part)
    try:
        yield
    finally:
        for part in spelled_out:
            del part.forward


def _tanh_gelu(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(x, approximate="tanh") if x.dtype in EXACT else type(part).forward(part, x)
