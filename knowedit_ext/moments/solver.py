"""Solutions of (weight * C + K K^T) S = K from a layer's moment, with factors kept for the next edit."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from scipy.linalg import lapack

from .. import ops
from ..ops.cholesky import norm_bound

if TYPE_CHECKING:
    from .store import Moment

logger = logging.getLogger(__name__)


class NotPositiveDefiniteError(ValueError):
    """A moment that cannot be factored; `layer`, `count`, `pivot` (the one that is not positive) and `ridge`."""

    def __init__(self, moment: Moment, weight: float, order: int, pivot: float, ridge: float) -> None:
        self.layer, self.count, self.order, self.pivot, self.ridge = moment.layer, moment.count, order, pivot, ridge
        super().__init__(
            f"the second moments of layer {moment.layer} are not positive definite: they are over {moment.count} keys "
            f"of width {moment.width}, pivot {order} of {weight:g} * C is {pivot:.3g}. Collect more keys (10 x the "
            f"width go far), or ask for the smallest ridge that makes them so: ridge={ridge:.3g} (or ridge='smallest')"
        )


@dataclass(frozen=True)
class Solution:
    """S and how it was come by.

    matrix: S [d_in, n], float64, on the keys' device; backward_error: largest |r| / (|A| |s| + |k|) over the columns;
    steps: refinement steps; method: "woodbury" or "sum" (the factored sum); ridge: what was added to C's diagonal.
    """

    matrix: torch.Tensor
    backward_error: float
    steps: int
    method: str
    ridge: float


@dataclass(frozen=True)
class Factor:
    """lower: [d, d] factor of weight * (C + ridge * I) of `moment`, mean: C, both where they are solved; norm: |C|_2
    from below."""

    moment: Moment
    weight: float
    mean: torch.Tensor
    lower: torch.Tensor
    norm: float
    ridge: float

    @cached_property
    def condition(self) -> float:
        """An estimate, for messages alone: it brings the factor to the host."""
        columns = max(float(rows.abs().sum(1).max()) for rows in self.mean.split(1024))  # 1-norm of C
        return condition_estimate(self.lower, self.weight * (columns + self.ridge))


class FactorCache:
    """Factors by layer, weight, ridge, precision and device; the least recently used go first.

    limit: how many are kept. One takes 8 d^2 bytes (75 MB for d = 3072, 2.1 GB for d = 16384), and as many for the
    moment where that lies on another device.
    """

    def __init__(self, limit: int = 8) -> None:
        self.limit = limit
        self.hits = 0
        self._kept: OrderedDict[tuple, Factor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        self._kept.clear()

    def get(
        self, moment: Moment, weight: float, ridge: float | str | None, low_precision: bool, device: torch.device
    ) -> Factor:
        key = (moment.layer, float(weight), ridge or None, low_precision, str(device))
        if key in self._kept and self._kept[key].moment is moment:
            self.hits += 1
        else:
            self._kept[key] = make_factor(moment, weight, ridge, low_precision, device)
        self._kept.move_to_end(key)
        while len(self._kept) > max(1, self.limit):
            self._kept.popitem(last=False)
        return self._kept[key]


def make_factor(
    moment: Moment, weight: float, ridge: float | str | None, low_precision: bool, device: torch.device
) -> Factor:
    """Factor weight * (C + ridge * I); `NotPositiveDefiniteError` where that cannot be."""
    if isinstance(ridge, str) and ridge != "smallest":
        raise ValueError(f"unknown ridge {ridge!r}: expected a number or 'smallest'")
    mean = moment.mean.to(device)
    if not bool(mean.isfinite().all()):
        raise ValueError(f"the second moments of layer {moment.layer} are not finite")
    asked = 0.0 if ridge is None or ridge == "smallest" else float(ridge)
    lower, info = ops.cholesky_factor(mean, weight, asked, low_precision)
    if int(info) and low_precision:  # beyond float32, not necessarily beyond float64
        logger.info("layer %d: no float32 factor, factoring in float64", moment.layer)
        lower, info = ops.cholesky_factor(mean, weight, asked)
    if int(info):
        order, least = int(info), smallest_ridge(mean, weight)
        pivot = failing_pivot(mean, weight, asked, order)
        if ridge != "smallest":
            raise NotPositiveDefiniteError(moment, weight, order, pivot, least)
        logger.warning(
            "layer %d: moments over %d keys are not positive definite (pivot %d: %.3g); adding ridge %.3g",
            moment.layer, moment.count, order, pivot, least,
        )  # fmt: skip
        asked = least
        lower, _ = ops.cholesky_factor(mean, weight, asked)
    return Factor(moment, weight, mean, lower, norm_bound(mean), asked)


def solve(
    moment: Moment,
    keys: torch.Tensor,
    weight: float,
    ridge: float | str | None,
    low_precision: bool,
    cache: FactorCache,
) -> Solution:
    """See `Moments.solve`."""
    if keys.dim() != 2 or keys.shape[0] != moment.width:
        raise ValueError(f"keys of layer {moment.layer} must be [{moment.width}, n], got {list(keys.shape)}")
    if not bool(keys.isfinite().all()):
        raise ValueError(f"keys of layer {moment.layer} are not finite")
    keys = keys.detach()
    factor = cache.get(moment, weight, ridge, low_precision, keys.device)
    s, report, info = ops.cholesky_solve_update(factor.mean, keys, weight, factor.ridge, factor.lower, factor.norm)
    if int(info):
        raise ValueError(
            f"layer {moment.layer}: {weight:g} * C + K K^T has no Cholesky factor in float64 (C has condition "
            f"{factor.condition:.1g}, K K^T is larger than it by far): use a larger weight or a ridge"
        )
    error, steps, summed = report.tolist()
    if error > 1e-14:
        logger.warning(
            "layer %d: backward error %.1e after %d refinement steps (condition %.1g)",
            moment.layer, error, steps, factor.condition,
        )  # fmt: skip
    return Solution(s, error, int(steps), "sum" if summed else "woodbury", factor.ridge)


def smallest_ridge(mean: torch.Tensor, weight: float) -> float:
    """The smallest power of ten times the mean diagonal, from 1e-15 on, that makes C + ridge * I factorable."""
    unit = float(mean.diagonal().abs().mean()) or 1.0
    for power in range(-15, 16):
        ridge = unit * 10.0**power
        if not int(ops.cholesky_factor(mean, weight, ridge)[1]):
            return ridge
    raise ValueError("no ridge makes this matrix positive definite")


def failing_pivot(mean: torch.Tensor, weight: float, ridge: float, order: int) -> float:
    """The Schur complement at the first leading minor that is not positive: what its pivot would be."""
    last = mean[order - 1].to(torch.float64) * weight
    pivot = float(last[order - 1]) + weight * ridge
    if order > 1:
        lower, _ = ops.cholesky_factor(mean[: order - 1, : order - 1], weight, ridge)
        half = torch.linalg.solve_triangular(lower, last[: order - 1, None], upper=False)
        pivot -= float(half.square().sum())
    return pivot


def condition_estimate(lower: torch.Tensor, norm: float) -> float:
    """1-norm condition of L L^T from its factor (LAPACK's pocon, O(d^2)); norm: its 1-norm."""
    factor = lower.cpu().to(torch.float64).T.contiguous().T.numpy()  # by columns, as LAPACK wants it
    rcond, _ = lapack.dpocon(factor, norm, uplo="L")
    return float("inf") if rcond == 0 else 1 / float(rcond)
