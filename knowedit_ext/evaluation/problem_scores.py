"""How far an edit solved its problem, from the target's probabilities before and after (Hase et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as brief
from typing import Any

import numpy as np

from ..editing.problems import problem_of

KINDS = ("rewrite", "paraphrase", "neighborhood")
LEAST = 2e-8  # of a probability that was to rise, as released
MOST_ESSENCE = 5.0  # rise in perplexity at which nothing of the essence is left


def problem_scores(problem: str, pre: Mapping[str, Any], post: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's scores of p(target), 0 to 1, of one edit or, of arrays, each of many.

    problem: one of `PROBLEMS`. pre, post: for "rewrite", "paraphrase" and "neighborhood" the target's probability (the
    product over its tokens), before the edit and after; "essence", where both have it: the perplexity of texts about
    the subject.

    "rewrite" and "paraphrase" are the share of what was missing to 1 that the edit brought, or, where the target was to
    become less likely, the share of its probability that is gone; "neighborhood" is how much of it stayed as it was;
    "overall" is the mean of the three, as in the paper's figures, "harmonic" their harmonic mean, as in the released
    table. With essence also "essence" and "overall_essence", the mean of the four.

    Raises ValueError for what is no probability.
    """
    minimise = problem_of(problem).minimise
    before, now = (
        {kind: _probability(side, kind, name) for kind in KINDS} for side, name in ((pre, "pre"), (post, "post"))
    )
    toward = _erased if minimise else _recovered
    scores = {kind: toward(before[kind], now[kind]) for kind in ("rewrite", "paraphrase")}
    scores["neighborhood"] = _kept(before["neighborhood"], now["neighborhood"])
    parts = np.stack([scores[kind] for kind in KINDS])
    scores["overall"] = parts.mean(0)
    with np.errstate(divide="ignore"):
        scores["harmonic"] = np.where((parts > 0).all(0), len(KINDS) / (1 / parts).sum(0), 0.0)
    if "essence" in pre and "essence" in post:
        rise = np.asarray(post["essence"], np.float64) - np.asarray(pre["essence"], np.float64)
        scores["essence"] = 1 - np.clip(rise, 0, MOST_ESSENCE) / MOST_ESSENCE
        scores["overall_essence"] = np.mean([*parts, scores["essence"]], axis=0)
    return {name: value if np.ndim(value) else float(value) for name, value in scores.items()}


def _recovered(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Of what was missing to certainty; where nothing was, all of it is there unless some is lost."""
    missing = 1 - before
    gone = np.divide(1 - now, missing, out=np.where(now < before, 1.0, 0.0), where=missing > 0)
    return np.maximum(LEAST, 1 - gone)


def _erased(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, np.divide(before - now, before, out=np.zeros_like(before), where=before > 0))


def _kept(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    return 1 - np.abs(now - before) / (np.abs(before - 0.5) + 0.5)  # of the farthest it could have gone


def _probability(side: Mapping[str, Any], kind: str, name: str) -> np.ndarray:
    if kind not in side:
        raise ValueError(f"{name} lacks '{kind}': expected probabilities of {', '.join(KINDS)}")
    try:
        value = np.asarray(side[kind], np.float64)
    except (TypeError, ValueError):
        value = np.array(np.nan)
    if not ((value >= 0) & (value <= 1 + 1e-6)).all():
        raise ValueError(f"{name}.{kind} is {brief(side[kind])}: expected probabilities, from 0 to 1")
    return np.minimum(value, 1.0)
