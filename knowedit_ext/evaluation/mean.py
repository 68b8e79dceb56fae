"""A mean over cases and its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Mean:
    """A mean over n cases and its standard error (None for a single one)."""

    mean: float
    stderr: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        x = np.asarray(values, dtype=np.float64)
        error = float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else None
        return cls(float(x.mean()), error, len(x))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
