"""`moment_update`: torch GEMMs over the lower triangle only, a panel of block rows at a time, or the CUDA kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.precision import float32_products
from . import _native, launch_cuda
from .reference import compute_dtype

# Rows multiplied at a time: float32 sums stay this short before they reach a float64 acc. On a GPU, where going through
# acc costs more beside the products, they are those of a batch of moments.
_ROWS, _GPU_ROWS = 1 << 12, 1 << 13
_PANEL = 512  # block rows: of the squares on the diagonal half the arithmetic is for nothing
_PANELS = 8  # on a GPU, where wide GEMMs count for more: 1.78 times less arithmetic than the full product


def update(acc: Tensor, x: Tensor, mask: Tensor | None, by: str) -> None:
    """acc [d, d] (lower triangle) += x^T diag(mask) x, x [n, d]; products in float32 (float64 for float64 x)."""
    by = preferred(x) if by == "auto" else by
    native = None if by == "library" else _native.module("cuda")
    if native is not None and x.numel():
        launch_cuda.moment_update(native, acc, x, mask, _GPU_ROWS, by)
        torch.autograd.graph.increment_version(acc)
    else:
        with float32_products("ieee"):
            update_by_gemm(acc, x, mask)


def preferred(x: Tensor) -> str:
    """The body that should be the fastest for this x; not yet run on a GPU.

    The kernel has half the arithmetic of a full product, and its mma.sync is the fastest way to a tensor core up to
    Ampere; float32 rows, as three bfloat16 ones, gain anywhere. From Hopper on the library's 16-bit GEMM is expected to
    win by more than the triangle saves.
    """
    if x.device.type != "cuda" or x.dtype == torch.float64:
        return "library"
    return "mma" if x.dtype == torch.float32 or torch.cuda.get_device_capability(x.device)[0] < 9 else "library"


def update_by_gemm(acc: Tensor, x: Tensor, mask: Tensor | None) -> None:
    """`update` by torch GEMMs."""
    on_gpu = x.device.type == "cuda"
    keep_16_bits = on_gpu and x.dtype.itemsize == 2  # tensor cores sum in float32
    panel = max(_PANEL, len(acc) // _PANELS) if on_gpu else _PANEL
    step = _GPU_ROWS if on_gpu else _ROWS
    for first in range(0, len(x), step):
        rows = x[first : first + step]
        if mask is not None:
            kept = mask[first : first + step]
            rows = torch.where(kept[:, None], rows, 0) if on_gpu else rows[kept]  # a selection would wait for the GPU
        if not keep_16_bits:
            rows = rows.to(compute_dtype(x.dtype))
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        _add_chunk(acc, rows, panel, torch.float32 if keep_16_bits else None)


def _add_chunk(acc: Tensor, rows: Tensor, panel: int, wide: torch.dtype | None) -> None:
    """The same for a chunk of rows [n, d]; wide: the dtype of the products where it is not that of the rows."""
    for top in range(0, len(acc), panel):
        end = min(top + panel, len(acc))
        left, right = rows[:, top:end].T, rows[:, :end]  # [panel, n], [n, end]
        product = left @ right if wide is None else torch.mm(left, right, out_dtype=wide)  # block row of the triangle
        acc[top:end, :top] += product[:, :top]
        acc[top:end, top:end] += product[:, top:].tril()
