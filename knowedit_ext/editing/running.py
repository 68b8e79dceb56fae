"""Mean and spread of what was seen, in parts that can be joined in any order (Chan, Golub and LeVeque 1983)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Running:
    """count rows; mean [d] and squares [d], the sum of squared differences from the mean, in float64."""

    count: int
    mean: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor) -> Running:
        """Of rows [n, d]."""
        rows = rows.double()
        mean = rows.mean(0)
        return cls(len(rows), mean, (rows - mean).square().sum(0))

    @classmethod
    def join(cls, parts: Iterable[Running]) -> Running:
        """Of all rows together."""
        first, *rest = parts
        for part in rest:
            count, delta = first.count + part.count, part.mean - first.mean
            mean = first.mean + delta * (part.count / count)
            squares = first.squares + part.squares + delta.square() * (first.count * part.count / count)
            first = cls(count, mean, squares)
        return first

    def tensor(self) -> torch.Tensor:
        """[3, d]: count, mean, squares; what an edit keeps."""
        return torch.stack([torch.full_like(self.mean, self.count), self.mean, self.squares]).cpu()

    @classmethod
    def from_tensor(cls, kept: torch.Tensor) -> Running:
        return cls(int(kept[0, 0]), kept[1].double(), kept[2].double())
