"""What explains how well edits work: the layer, the tracing effect, or both (Hase et al. 2023, section 5).

R's lm(score ~ factor(layer)), lm(score ~ effect), lm(score ~ factor(layer) * effect), and anova of the last against the
first; designs may be rank deficient (an effect that is constant in a layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..runs.interrupts import imported

RANK = 1e-7  # of a column that the others explain, as R's lm has it


@dataclass(frozen=True)
class Regression:
    """n rows; r2_*: of the scores' variance; f, p, df: of both against layer alone (NaN where nothing is left to test).

    correlation: Pearson's, of score and effect at each layer; 0 where one of them is constant.
    """

    n: int
    r2_layer: float
    r2_trace: float
    r2_both: float
    f: float
    p: float
    df: tuple[int, int]
    correlation: dict[int, float]

    @property
    def gain(self) -> float:
        """What the tracing effect explains beside the layer."""
        return self.r2_both - self.r2_layer

    def to_dict(self) -> dict[str, Any]:
        """For JSON, where no number is NaN."""
        values = asdict(self) | {"gain": self.gain}
        values["correlation"] = {str(layer): _or_none(value) for layer, value in self.correlation.items()}
        return {name: _or_none(value) for name, value in values.items()}


def regress(score: Sequence[float], layer: Sequence[int], effect: Sequence[float]) -> Regression:
    """Rows are edits: how well each did, the layer that was edited, its fact's tracing effect at that layer.

    Raises ValueError for lists of different lengths, numbers that are not finite, and scores that are all the same.
    """
    y, x = np.asarray(score, np.float64), np.asarray(effect, np.float64)
    at = np.asarray(layer)
    if not len(y) == len(x) == len(at) or y.ndim != 1 or not len(y):
        raise ValueError(f"{len(y)} scores, {len(at)} layers, {len(x)} effects: expected a row of three for each edit")
    if not (np.isfinite(y).all() and np.isfinite(x).all()):
        raise ValueError("a score or an effect is no finite number")
    total = float(((y - y.mean()) ** 2).sum())
    if total <= (1e-12 * max(1.0, float(np.abs(y).max()))) ** 2 * len(y):
        raise ValueError("all scores are the same: there is nothing to explain")
    layers = sorted({int(n) for n in at})
    factor = np.stack([at == n for n in layers], axis=1).astype(np.float64)  # [rows, layers]
    of_layer, rank = _residual(factor, y)
    of_trace, _ = _residual(np.stack([np.ones_like(x), x], axis=1), y)
    of_both, rank_both = _residual(np.concatenate([factor, factor * x[:, None]], axis=1), y)
    df = (rank_both - rank, len(y) - rank_both)
    f, p = _f_test(of_layer, of_both, df)
    correlation = {n: _correlation(y[at == n], x[at == n]) for n in layers}
    return Regression(len(y), 1 - of_layer / total, 1 - of_trace / total, 1 - of_both / total, f, p, df, correlation)


def _residual(design: np.ndarray, y: np.ndarray) -> tuple[float, int]:
    """Sum of squares that is left, and the design's rank; each column is measured by what those before leave of it."""
    basis: list[np.ndarray] = []
    left = y.copy()
    for column in design.T:
        size = np.linalg.norm(column)
        for _ in range(2):  # once more: what rounding leaves of the others
            for other in basis:
                column = column - other * (other @ column)
        if size and np.linalg.norm(column) > RANK * size:
            basis.append(column / np.linalg.norm(column))
            left -= basis[-1] * (basis[-1] @ left)
    return float(left @ left), len(basis)


def _f_test(without: float, within: float, df: tuple[int, int]) -> tuple[float, float]:
    if not (df[0] > 0 and df[1] > 0 and within > 0):
        return float("nan"), float("nan")
    value = max(0.0, without - within) / df[0] / (within / df[1])
    return value, float(imported("scipy.stats").f.sf(value, *df))


def _correlation(y: np.ndarray, x: np.ndarray) -> float:
    if np.ptp(y) == 0 or np.ptp(x) == 0:
        return 0.0
    return float(np.corrcoef(y, x)[0, 1])


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
