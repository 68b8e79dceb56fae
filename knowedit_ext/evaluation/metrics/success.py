"""Success and magnitude: is the right target likelier than the other, and by how much (summarize.py:47-151).

ES EM for the edited prompt, PS PM for paraphrases; NS NM for neighbours, where the true target is the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..metric import Metric

COLUMNS = {
    "rewrite_prompts": ("ES", "EM"),
    "paraphrase_prompts": ("PS", "PM"),
    "neighborhood_prompts": ("NS", "NM"),
}


def _read(measured: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for sort, (success, magnitude) in COLUMNS.items():
        if not (nll := measured.get(f"{sort}_probs")):
            continue
        new, true = (np.array([x[target] for x in nll]) for target in ("target_new", "target_true"))
        wanted, other = (true, new) if sort == "neighborhood_prompts" else (new, true)
        found[success] = 100.0 * float((wanted < other).mean())  # strictly likelier
        found[magnitude] = 100.0 * float((np.exp(-wanted) - np.exp(-other)).mean())
    return found


METRIC = Metric(tuple(column for pair in COLUMNS.values() for column in pair), 10, _read)
