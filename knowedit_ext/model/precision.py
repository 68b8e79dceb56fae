"""Which float32 GEMMs a GPU may do in TF32 (10 bits of mantissa): none, unless the user says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def float32_products(kind: str) -> Iterator[None]:
    """Within, float32 GEMMs on CUDA are "ieee" (exact products) or "tf32"; afterwards as before."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = kind
    try:
        yield
    finally:
        matmul.fp32_precision = before


def backward_products(precision: str | None) -> AbstractContextManager[None]:
    """Within, gradients of a model of this precision are multiplied as its forward pass is."""
    return nullcontext() if precision is None else float32_products(precision)


class TF32Within:
    """Hooks that let `modules` (none inside another) do their float32 GEMMs in TF32, and nothing else."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._before: str | None = None
        self._hooks = []
        for module in modules:
            self._hooks.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self._before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"

    def _leave(self, module: nn.Module, args: tuple, output: object) -> None:
        if self._before is not None:  # an earlier pre-hook may have raised
            torch.backends.cuda.matmul.fp32_precision = self._before
            self._before = None
