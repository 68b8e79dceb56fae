"""`moment_update` as torch GEMMs over the lower triangle only, a panel of block rows at a time."""

from __future__ import annotations

from torch import Tensor

from .reference import compute_dtype

_ROWS = 1 << 12  # rows multiplied at a time: float32 sums stay this short before they reach a float64 acc
_PANEL = 512  # block rows: of the squares on the diagonal half the arithmetic is for nothing


def update(acc: Tensor, x: Tensor, mask: Tensor | None) -> None:
    """acc [d, d] (lower triangle) += x^T diag(mask) x, x [n, d]; products in float32 (float64 for float64 x)."""
    kind = compute_dtype(x.dtype)
    for first in range(0, len(x), _ROWS):
        rows = x[first : first + _ROWS]
        if mask is not None:
            rows = rows[mask[first : first + _ROWS]]
        rows = rows.to(kind)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        _add_chunk(acc, rows)


def _add_chunk(acc: Tensor, rows: Tensor) -> None:
    """The same for a chunk of rows [n, d] already in the dtype of the products."""
    for top in range(0, len(acc), _PANEL):
        end = min(top + _PANEL, len(acc))
        left = rows[:, top:end].T  # [panel, n]
        product = left @ rows[:, :end]  # [panel, end]: block row of the triangle
        acc[top:end, :top] += product[:, :top]
        acc[top:end, top:end] += product[:, top:].tril()
