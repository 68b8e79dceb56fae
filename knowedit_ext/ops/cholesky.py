"""`cholesky_factor` and `cholesky_solve_update` by LAPACK (on a GPU: cuSOLVER) through torch, refined in float64.

A = weight * (C + ridge * I) + K K^T, S = A^-1 K. Never an inverse, never LU. On CUDA, too, the library factors until a
run on a GPU shows our own factorisation (csrc/cuda/cholesky.cu) to be faster; by="kernel" chooses that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _native, launch_cuda

Solve = Callable[[Tensor], Tensor]
Judge = Callable[[Tensor], tuple[Tensor, float]]

_BLOCK = 1024  # rows of a float32 matrix converted at a time
WOODBURY = 4  # d >= WOODBURY * n: K K^T is a low-rank change to the factored weight * C


def product(moment: Tensor, x: Tensor) -> Tensor:
    """C x in float64 [d, n]; C [d, d] float32 or float64 (converted a block of rows at a time), x float64 [d, n]."""
    if moment.dtype == x.dtype:
        return moment @ x
    return torch.cat([rows.to(x.dtype) @ x for rows in moment.split(_BLOCK)])


def norm_bound(moment: Tensor) -> float:
    """|C|_2 from below, mostly within a few per cent: power iteration from the column of the largest key."""
    x = moment[:, int(moment.diagonal().abs().argmax())].to(torch.float64)[:, None]
    size = float(x.norm())
    for _ in range(3):
        x = product(moment, x / x.norm().clamp(min=1e-300))
        size = max(size, float(x.norm()))
    return size


def _shifted(moment: Tensor, weight: float, ridge: float, dtype: torch.dtype) -> Tensor:
    """weight * (C + ridge * I) in new memory, laid out by columns as LAPACK wants it."""
    a = torch.empty_like(moment, dtype=dtype, memory_format=torch.contiguous_format).T
    torch.mul(moment, weight, out=a) if moment.dtype == dtype else a.copy_(moment).mul_(weight)
    a.diagonal().add_(weight * ridge)
    return a


def factor(
    moment: Tensor, weight: float, ridge: float, dtype: torch.dtype, by: str = "library"
) -> tuple[Tensor, Tensor]:
    """Lower factor of weight * (C + ridge * I), and LAPACK's info: 0, or the order of the first minor that fails."""
    return _factor_in_place(_shifted(moment, weight, ridge, dtype), by)


def factor_sum(
    moment: Tensor, weight: float, ridge: float, blocks: Sequence[Tensor], by: str = "library"
) -> tuple[Tensor, Tensor]:
    """As `factor`, of weight * (C + ridge * I) + the sum of B B^T over blocks B [d, m], in float64."""
    a = _shifted(moment, weight, ridge, torch.float64)
    for block in blocks:
        a.addmm_(block, block.T)
    return _factor_in_place(a, by)


def _factor_in_place(a: Tensor, by: str) -> tuple[Tensor, Tensor]:
    """The lower factor in the memory of a (symmetric, by columns), and info; above the diagonal may be anything."""
    native = _native.module("cuda") if by == "kernel" else None
    if native is not None:
        return launch_cuda.cholesky(native, a.T)
    info = torch.empty((), dtype=torch.int32, device=a.device)
    torch.linalg.cholesky_ex(a, out=(a, info))
    return a, info.long()


@dataclass(frozen=True)
class System:
    """A = weight * (C + ridge * I) + the sum of B B^T over blocks B [d, m], float64; size: |A|_2 from below."""

    moment: Tensor
    weight: float
    ridge: float
    blocks: Sequence[Tensor]
    size: float

    def judge(self, k: Tensor) -> Judge:
        """s -> the residual of A s = k, and its backward error."""

        def judge(s: Tensor) -> tuple[Tensor, float]:
            residual = product(self.moment, s).mul_(-self.weight).add_(k)
            for block in self.blocks:
                residual.addmm_(block, block.T @ s, alpha=-1)
            if self.ridge:
                residual.add_(s, alpha=-self.weight * self.ridge)
            return residual, _backward_error(residual, s, k, self.size)

        return judge


def least_size(known: float, keys: Tensor) -> float:
    """A lower bound of |M + K K^T|_2 where `known` is one of |M|_2, M positive."""
    return max(known, norm_bound(keys.T @ keys) if keys.numel() else 0.0)


def solve(
    moment: Tensor,
    keys: Tensor,
    weight: float,
    ridge: float,
    factored: Tensor | None,
    norm: float,
    tolerance: float,
    steps: int,
    by: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """S [d, n] float64; backward error, refinement steps, was the sum factored [3]; LAPACK's info."""
    k = keys.to(torch.float64)
    judge = System(moment, weight, ridge, (k,), least_size(weight * ((norm or norm_bound(moment)) + ridge), k)).judge(k)

    def report(s: Tensor, error: float, taken: int, summed: bool, info: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        facts = torch.tensor([error, taken, summed], dtype=torch.float64, device=k.device)
        return s.contiguous(), facts, torch.tensor(info, device=k.device)

    woodbury = None
    if factored is not None and len(k) >= WOODBURY * k.shape[1]:
        woodbury = refined(k, _woodbury(factored, k), judge, tolerance, steps)
        if woodbury[1] <= tolerance:
            return report(*woodbury, summed=False)
    # Many keys, no factor, or one that is too coarse (float32; K K^T so large that Woodbury cancels): factor the sum.
    lower, info = factor_sum(moment, weight, ridge, [k], by)
    if not int(info):
        return report(*refined(k, lambda r: triangles(lower, r), judge, tolerance, steps), summed=True)
    if woodbury is not None and woodbury[1] < 1e-10:  # the sum is beyond float64: what Woodbury reached, as reported
        return report(*woodbury, summed=False)
    return report(torch.full_like(k, float("nan")), float("nan"), 0, summed=True, info=int(info))


def refined(
    k: Tensor, approximate: Solve, judge: Judge, tolerance: float = 1e-14, steps: int = 10
) -> tuple[Tensor, float, int]:
    """approximate(k), refined as long as that helps; with its backward error and the steps taken."""
    s, taken = approximate(k), 0
    residual, error = judge(s)
    while tolerance < error < float("inf") and taken < steps:
        better = s + approximate(residual)
        residual, now = judge(better)
        if not now < error:
            break
        s, error, slow, taken = better, now, now > error / 2, taken + 1
        if slow:  # stagnates: more steps would not help
            break
    return s, error, taken


def _woodbury(lower: Tensor, k: Tensor) -> Solve:
    """r -> (L L^T + K K^T)^-1 r in O(d^2 n), by the n x n system of K^T (L L^T)^-1 K."""

    def base(r: Tensor) -> Tensor:
        return triangles(lower, r.to(lower.dtype)).to(r.dtype)

    y = base(k)  # [d, n]
    small = k.T @ y
    small = (small + small.T) / 2
    small.diagonal().add_(1)
    inner, info = torch.linalg.cholesky_ex(small)
    if int(info):  # only a factor of low precision comes to this: say so by a residual that is not finite
        inner = torch.full_like(inner, float("nan"))

    def approximate(r: Tensor) -> Tensor:
        z = y if r is k else base(r)
        return z - y @ triangles(inner, k.T @ z)

    return approximate


def triangles(lower: Tensor, r: Tensor) -> Tensor:
    """(L L^T)^-1 r by two triangular solves (torch.cholesky_solve would copy L first)."""
    half = torch.linalg.solve_triangular(lower, r, upper=False)
    return torch.linalg.solve_triangular(lower.T, half, upper=True)


def _backward_error(residual: Tensor, s: Tensor, k: Tensor, size: float) -> float:
    """Largest |r| / (|A| |s| + |k|) over the columns."""
    if not residual.numel():
        return 0.0
    scale = size * s.norm(dim=0) + k.norm(dim=0)
    error = residual.norm(dim=0) / scale.clamp(min=1e-300)
    return float(error.max()) if bool(error.isfinite().all()) else float("inf")
