"""The ranks of a `torchrun`, or the one process there is."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


class Ranks:
    """`rank` of `size`; sums and broadcasts over gloo, which do nothing for a single process."""

    def __init__(self) -> None:
        self._own = not (dist.is_available() and dist.is_initialized())
        self.size = int(os.environ.get("WORLD_SIZE", 1)) if self._own else dist.get_world_size()
        self.rank = int(os.environ.get("RANK", 0)) if self._own else dist.get_rank()
        self._group = None
        if self.size > 1:
            patient = timedelta(days=7)  # ranks may be done at different times
            if self._own:
                dist.init_process_group("gloo", timeout=patient)
            else:
                self._group = dist.new_group(backend="gloo", timeout=patient)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        if self.size > 1 and self._own:
            dist.destroy_process_group()

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
