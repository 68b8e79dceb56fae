"""`target_logprob` in vocabulary tiles: a running log-sum-exp, never [rows, vocab] at once.

The CUDA kernel where there is one, torch GEMMs elsewhere and backward. A GPU multiplies 16-bit numbers as they are,
with sums and results in float32; a CPU converts them first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native, launch_cuda
from .reference import compute_dtype

_TILE = 1 << 22  # logits held at a time on a GPU
_CPU_WIDTH = 960  # tokens of a tile; not divisible by 16, or a power of two, CPU libraries multiply a third slower
_ROWS = 1 << 12  # rows taken at a time


def _tiles(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (first token, weight tile [t, d], logits [rows, t]) over the vocabulary; logits in the compute dtype, tiles
    as they are multiplied."""
    kind = _multiplied_as(hidden)
    x = hidden.to(kind)
    width = _CPU_WIDTH if hidden.device.type == "cpu" else max(256, _TILE // max(1, len(hidden)) // 64 * 64)
    for start in range(0, len(weight), width):
        tile = weight[start : start + width].to(kind)
        logits = _product(x, tile.T, None if bias is None else bias[start : start + width])
        yield start, tile, softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def _multiplied_as(hidden: Tensor) -> torch.dtype:
    return hidden.dtype if hidden.is_cuda else compute_dtype(hidden.dtype)


def _product(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    """a b + plus in the compute dtype of b, whose dtype a is rounded to."""
    kind = compute_dtype(b.dtype)
    if b.dtype != kind:
        out = torch.mm(a.to(b.dtype), b, out_dtype=kind)
        return out if plus is None else out.add_(plus)
    return a.to(kind) @ b if plus is None else torch.addmm(plus.to(kind), a.to(kind), b)


def _log_sum_exp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """log sum exp of the logits [rows] and the targets' logits [rows, k]."""
    kind = compute_dtype(hidden.dtype)
    total = torch.full((len(hidden),), float("-inf"), dtype=kind, device=hidden.device)
    picked = torch.full(targets.shape, float("nan"), dtype=kind, device=hidden.device)  # NaN: no such token
    for start, _, logits in _tiles(hidden, weight, bias, softcap):
        total = torch.logaddexp(total, logits.logsumexp(1))
        here = targets - start
        inside = (here >= 0) & (here < logits.shape[1])
        picked = torch.where(inside, logits.gather(1, here.clamp(0, logits.shape[1] - 1)), picked)
    return total, picked


def _columns(targets: Tensor) -> Tensor:
    """[rows] or [rows, k] as [rows, k]."""
    return targets if targets.dim() == 2 else targets[:, None]


def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float) -> Tensor:
    """log softmax(softcap(hidden W^T + b))[target], float32 (float64 for float64), shaped like targets."""
    native = _native.module("cuda") if hidden.device.type == "cuda" else None
    if native is not None:
        return launch_cuda.target_logprob(native, hidden, weight, bias, targets, softcap)
    return forward_by_gemm(hidden, weight, bias, targets, softcap)


def forward_by_gemm(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float) -> Tensor:
    """The same by torch GEMMs over tiles."""
    wide = _columns(targets)
    pieces = []
    for x, t in zip(hidden.split(_ROWS), wide.split(_ROWS), strict=True):
        total, picked = _log_sum_exp(x, weight, bias, t, softcap)
        pieces.append(picked - total[:, None])
    return torch.cat(pieces).view(targets.shape)


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in hidden, weight and bias (None where not needed), tile by tile."""
    kind = compute_dtype(hidden.dtype)
    dx, dw, db = (
        torch.zeros(shape, dtype=kind, device=hidden.device) if need else None
        for need, shape in zip(needed, (hidden.shape, weight.shape, weight.shape[:1]), strict=True)
    )
    wide, up = _columns(targets), _columns(grad.to(kind))
    for first in range(0, len(hidden), _ROWS):
        at = slice(first, first + _ROWS)
        x, t, g = hidden[at], wide[at], up[at]
        total, _ = _log_sum_exp(x, weight, bias, t, softcap)
        for start, tile, logits in _tiles(x, weight, bias, softcap):
            end = start + len(tile)
            dl = -(logits - total[:, None]).exp() * g.sum(1, keepdim=True)  # [rows, t]
            dl.scatter_add_(1, (t - start).clamp(0, len(tile) - 1), g * ((t >= start) & (t < end)))
            if softcap > 0:
                dl *= 1 - (logits / softcap) ** 2
            if dx is not None:
                dx[at] += _product(dl, tile)
            if dw is not None:
                dw[start:end] += _product(dl.T, x.to(tile.dtype))
            if db is not None:
                db[start:end] += dl.sum(0)
    cast = hidden.dtype
    return tuple(None if x is None else x.to(cast) for x in (dx, dw, db))


class Learned(torch.autograd.Function):
    """`target_logprob` for gradients in `hidden` alone: the logits are computed once.

    d log p(t) / dx = c_t W_t - E, where c = 1 - (logits / softcap)^2, or 1, and E [rows, d] is the mean of c_w W_w over
    p, taken from each tile of the logits while it is there.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float
    ) -> Tensor:
        wide = _columns(targets)
        total, expected = log_sum_exp_with_mean(hidden, weight, bias, softcap)
        x, ctx.kind = hidden.to(total.dtype), hidden.dtype
        picked = torch.stack([(x * weight[of]).sum(1) for of in wide.unbind(1)], 1)
        picked = picked if bias is None else picked + bias[wide]
        picked = softcap * torch.tanh(picked / softcap) if softcap > 0 else picked
        steep = 1 - (picked / softcap) ** 2 if softcap > 0 else torch.ones_like(picked)
        ctx.save_for_backward(weight, wide, expected, steep)
        return (picked - total[:, None]).view(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, wide, expected, steep = ctx.saved_tensors
        up = _columns(grad)
        dx = up.sum(1, keepdim=True) * -expected
        for column, of in zip((up * steep).unbind(1), wide.unbind(1), strict=True):
            dx.addcmul_(column[:, None], weight[of].to(dx.dtype))
        return dx.to(ctx.kind), None, None, None, None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
        total, mean = log_sum_exp_with_mean(hidden, weight, bias, softcap)
        ctx.save_for_backward(mean.to(hidden.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mean,) = ctx.saved_tensors
        return grad.to(mean.dtype)[:, None] * mean, None, None, None


def log_sum_exp(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float = 0.0) -> Tensor:
    """log sum exp(softcap(hidden W^T + b)) over the vocabulary [rows], float32 (float64 for float64).

    Differentiable in hidden alone, at next to no cost: the gradient comes out of the pass forward.
    """
    return _LogSumExp.apply(hidden, weight, bias, softcap)


@torch.no_grad()
def log_sum_exp_with_mean(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`log_sum_exp`, and its gradient in hidden [rows, d]: the mean of W's rows by their probability."""
    parts = [_sum_and_mean(x, weight, bias, softcap) for x in hidden.split(_ROWS)]
    total, mean = (torch.cat(x) for x in zip(*parts, strict=True))
    return total, mean


def _sum_and_mean(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> tuple[Tensor, Tensor]:
    kind = compute_dtype(hidden.dtype)
    most = hidden.new_full((len(hidden),), torch.finfo(kind).min, dtype=kind)  # a logit may be -inf
    total = torch.zeros_like(most)
    mean = hidden.new_zeros(hidden.shape, dtype=kind)
    for _, tile, logits in _tiles(hidden, weight, bias, softcap):
        before, most = most, torch.maximum(most, logits.amax(1))
        slope = 1 - (logits / softcap) ** 2 if softcap > 0 else None
        share = logits.sub_(most[:, None]).exp_()
        kept = (before - most).exp()
        total = total * kept + share.sum(1)
        mean *= kept[:, None]
        mean = _product(share if slope is None else share * slope, tile, mean)
    return most + total.log(), mean / total[:, None]
