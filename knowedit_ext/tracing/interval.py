"""A mean and its 95 % confidence interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean with the half width of its 95 % confidence interval, 1.96 s / sqrt(n), for the n of that very cell."""

    mean: float | list[float]
    half_width: float | list[float] | None  # None: fewer than two values
    n: int

    @classmethod
    def of(cls, values: np.ndarray) -> Interval:
        """values [n] or [n, layers]"""
        n = len(values)
        half = 1.96 * values.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else None
        return cls(values.mean(axis=0).tolist(), None if half is None else half.tolist(), n)
