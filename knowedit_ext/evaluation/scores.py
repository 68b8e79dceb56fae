"""From cases to the columns of the papers' tables (summarize.py:47-151; REFERENCE: Meng et al. 2022, Table 4).

All shares, differences and entropies are times 100, as printed there; essence is a perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .mean import Mean
from .metrics import METRICS

SUCCESSES = ("ES", "PS", "NS")
ACCURACIES = ("EA", "PA", "NA")


def values_of(measured: Mapping[str, Any]) -> dict[str, float]:
    """A case's "pre" or "post" -> the columns it gives, each a mean over the case's prompts.

    ValueError names the key whose value is not what is measured.
    """
    return {column: value for metric in METRICS for column, value in metric.read(measured).items()}


def summarise(cases: Iterable[Mapping[str, Any]], when: str) -> dict[str, Mean]:
    """Means over the cases that have a column; S comes first."""
    return summary_of([values_of(case[when]) for case in cases if when in case])


def summary_of(rows: Sequence[Mapping[str, float]]) -> dict[str, Mean]:
    """The same of what `values_of` gave."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    means = {name: Mean.of(values) for name, values in columns.items()}
    parts = parts_of_s(means)
    complete = [[row[name] for name in parts] for row in rows if all(name in row for name in parts)]
    return ({"S": harmonic(np.array(complete))} if complete else {}) | means


def parts_of_s(columns: Iterable[str]) -> tuple[str, ...]:
    """What S is the harmonic mean of: of zsRE, which has no successes, the accuracies."""
    return SUCCESSES if set(SUCCESSES) & set(columns) else ACCURACIES


def harmonic(values: np.ndarray) -> Mean:
    """Harmonic mean of the columns' means, for values [cases, columns]; 0 where one of them is 0.

    Its standard error is that of the linearised mean: dS = S^2/k sum_j dx_j / mean_j^2.
    """
    score, linear = _linearised(values)
    return Mean(score, _error(linear), len(values))


def harmonic_difference(first: np.ndarray, second: np.ndarray) -> Mean:
    """How much larger the first harmonic mean is than that of other values [cases, columns] of the same cases; its
    standard error is of the pairs' linearised difference."""
    (one, linear), (other, less) = _linearised(first), _linearised(second)
    paired = None if linear is None or less is None else linear - less
    return Mean(one - other, _error(paired), len(first))


def _linearised(values: np.ndarray) -> tuple[float, np.ndarray | None]:
    """The harmonic mean, and what each case adds to it to first order."""
    means = values.mean(axis=0)
    if (means <= 0).any():
        return 0.0, None
    columns = values.shape[1]
    score = columns / float((1 / means).sum())
    return score, score**2 / columns * ((values - means) / means**2).sum(axis=1)


def _error(linear: np.ndarray | None) -> float | None:
    if linear is None or len(linear) < 2:
        return None
    return float(linear.std(ddof=1)) / math.sqrt(len(linear))
