"""Symmetric matrices by their lower triangle."""

from __future__ import annotations

import torch


def pack(matrix: torch.Tensor) -> torch.Tensor:
    """[d, d] -> [d (d + 1) / 2], the lower triangle row by row."""
    return torch.cat([row[: number + 1] for number, row in enumerate(matrix)])


def unpack(packed: torch.Tensor, width: int) -> torch.Tensor:
    """The symmetric [d, d] whose lower triangle `pack` gave."""
    if packed.dim() != 1 or len(packed) != width * (width + 1) // 2:
        raise ValueError(f"a triangle of width {width} has {width * (width + 1) // 2} entries, not {packed.numel()}")
    matrix, first = packed.new_zeros(width, width), 0
    for number in range(width):
        matrix[number, : number + 1] = packed[first : first + number + 1]
        first += number + 1
    return symmetric(matrix)


def symmetric(matrix: torch.Tensor, block: int = 1024) -> torch.Tensor:
    """A new [d, d] with the lower triangle of `matrix` on both sides."""
    out = matrix.tril()
    for top in range(0, len(out), block):
        end = min(top + block, len(out))
        out[:top, top:end] = out[top:end, :top].T
        square = out[top:end, top:end]
        square += square.tril(-1).T
    return out
