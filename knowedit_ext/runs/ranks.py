"""The ranks of a `torchrun`, or the one process there is."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta

import torch
import torch.distributed as dist

_PATIENCE = timedelta(days=7)  # ranks may be done at different times
_by_itself = ContextVar("knowedit_by_itself", default=False)


@contextmanager
def by_itself() -> Iterator[None]:
    """Inside, each rank is the one process there is: what it calls is not shared with the others."""
    token = _by_itself.set(True)
    try:
        yield
    finally:
        _by_itself.reset(token)


class Ranks:
    """`rank` of `size`; sums and broadcasts over gloo, which do nothing for a single process.

    A process group that this starts is kept until the process ends: after one is destroyed, the next would meet what it
    left in the rendezvous.
    """

    def __init__(self) -> None:
        self._group = None
        if _by_itself.get():
            self.size, self.rank = 1, 0
            return
        begun = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if begun else int(os.environ.get("WORLD_SIZE", 1))
        self.rank = dist.get_rank() if begun else int(os.environ.get("RANK", 0))
        if self.size > 1 and not begun:
            dist.init_process_group("gloo", timeout=_PATIENCE)
            atexit.register(_leave)
        elif self.size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, on the CPU; the tensor itself when there is one rank."""
        if self.size > 1:
            tensor = tensor.detach().cpu().clone()
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor, on the CPU; the others give one of equal shape and dtype."""
        if self.size > 1:
            tensor = tensor.detach().cpu().clone()
            dist.broadcast(tensor, 0, group=self._group)
        return tensor

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier(group=self._group)

    def agree(self, value: int) -> bool:
        """Do all ranks have the same value?"""
        one = torch.tensor([value, -value], dtype=torch.int64)
        if self.size > 1:
            dist.all_reduce(one, op=dist.ReduceOp.MAX, group=self._group)
        return int(one[0]) == -int(one[1])


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
