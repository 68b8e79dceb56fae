"""A model under changes that are still being learnt: its modules put out what these add, with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from .editor import Factors


@contextmanager
def edited(modules: Mapping[str, nn.Module], factors: Sequence[Factors], counts: Sequence[int]) -> Iterator[None]:
    """Inside, the modules of the weights' names compute packed rows, each stretch of `counts` under its own change."""
    handles = []
    try:
        for name, module in modules.items():
            changes = [each[name] for each in factors]
            handles.append(module.register_forward_hook(partial(_add, changes, list(counts))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(
    changes: Sequence[tuple[torch.Tensor, torch.Tensor]],
    counts: list[int],
    module: nn.Module,
    args: tuple,
    out: torch.Tensor,
) -> torch.Tensor:
    parts = zip(args[0][0].split(counts), changes, strict=True)
    added = torch.cat([x.to(inputs) @ inputs.T @ outputs for x, (inputs, outputs) in parts])
    return (out.to(added) + added).to(out)
