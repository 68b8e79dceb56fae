"""A mean over few seeds, with Student's 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t


@dataclass(frozen=True)
class Spread:
    """half_width: of the 95 % interval, t(n - 1) s / sqrt(n); None for a single value. least, most: of the values."""

    mean: float
    half_width: float | None
    n: int
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        x = np.asarray(values, dtype=np.float64)
        n = len(x)
        half = float(t.ppf(0.975, n - 1) * x.std(ddof=1) / math.sqrt(n)) if n > 1 else None
        return cls(float(x.mean()), half, n, float(x.min()), float(x.max()))

    def text(self) -> str:
        half = "" if self.half_width is None else f" ± {_short(self.half_width)}"
        return f"{_short(self.mean)}{half}"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.2e}"
