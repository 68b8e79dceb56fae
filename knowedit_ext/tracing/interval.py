"""A mean and its 95 % confidence interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any

import numpy as np

from ..checks import Count, as_type


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

    @classmethod
    def read(cls, value: Any, where: str, many: bool = False) -> Interval:
        """Out of a file, for one value or for many (a value a layer); ValueError says what is something else."""
        if not isinstance(value, dict) or set(value) != {"mean", "half_width", "n"}:
            raise ValueError(f"{where} is {brief(value)}: expected an object with mean, half_width and n")
        kind = tuple[float, ...] if many else float
        mean = as_type(f"{where}.mean", value["mean"], kind)
        half = as_type(f"{where}.half_width", value["half_width"], kind | None)
        n = as_type(f"{where}.n", value["n"], Count)
        if many and half is not None and len(half) != len(mean) or many and not mean:
            raise ValueError(f"{where} has {len(mean)} means and {0 if half is None else len(half)} half widths")
        return cls(*((list(x) if isinstance(x, tuple) else x) for x in (mean, half)), n)
