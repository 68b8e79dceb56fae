"""Success and magnitude: is the right target likelier than the other, and by how much (summarize.py:47-151).

ES EM for the edited prompt, PS PM for paraphrases; NS NM for neighbours, where the true target is the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as brief
from typing import Any

import numpy as np

from ..metric import Metric, items, number

COLUMNS = {
    "rewrite_prompts": ("ES", "EM"),
    "paraphrase_prompts": ("PS", "PM"),
    "neighborhood_prompts": ("NS", "NM"),
}

TARGETS = ("target_new", "target_true")


def _pair(value: Any, key: str) -> tuple[float, ...]:
    """Negative log-probabilities of the two targets (below zero by rounding alone); none where there is no true one."""
    if isinstance(value, Mapping) and set(value) == {"target_new"}:
        number(value["target_new"], f"{key}.target_new", least=-100.0)
        return ()
    if not isinstance(value, Mapping) or not set(TARGETS) <= set(value):
        raise ValueError(f"{key} is {brief(value)}: expected an object with {' and '.join(TARGETS)}")
    return tuple(number(value[target], f"{key}.{target}", least=-100.0) for target in TARGETS)


def _read(measured: Mapping[str, Any]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for sort, (success, magnitude) in COLUMNS.items():
        pairs = items(measured, f"{sort}_probs", _pair)
        if sort == "neighborhood_prompts" and not all(pairs):  # without a true target they are no neighbours
            n = pairs.index(())
            shown = brief(measured[f"{sort}_probs"][n])
            raise ValueError(f"{sort}_probs[{n}] is {shown}: expected an object with {' and '.join(TARGETS)}")
        if not (nll := [pair for pair in pairs if pair]):
            continue
        new, true = np.array(nll).T
        wanted, other = (true, new) if sort == "neighborhood_prompts" else (new, true)
        scores[success] = 100.0 * float((wanted < other).mean())  # strictly likelier
        scores[magnitude] = 100.0 * float((np.exp(-wanted) - np.exp(-other)).mean())
    return scores


METRIC = Metric(tuple(column for pair in COLUMNS.values() for column in pair), 10, _read)
