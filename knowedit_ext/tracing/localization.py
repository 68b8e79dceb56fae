"""How much of a fact comes back when a layer is restored (Hase et al. 2023, section 4: the tracing effect)."""

from __future__ import annotations

import numpy as np

from .trace import Trace


def fraction_restored(trace: Trace) -> np.ndarray:
    """[layers] float64 in 0..1: of what corruption takes away, the share that the layer's best token brings back.

    max over tokens of (restored - low) / (high - low), clipped at 0; high is the larger of the clean and the best
    restored score, so nothing exceeds 1. Zeros where corruption takes nothing away and no restoration adds to it.
    """
    scores, low = trace.scores.astype(np.float64), float(trace.low_score)
    high = max(float(trace.high_score), float(np.nanmax(scores)))
    best = np.nanmax(scores, axis=0)  # tokens that were not traced are NaN
    if high - low <= np.finfo(np.float32).eps:  # scores are float32
        return np.zeros(len(best))
    return np.maximum(0.0, (best - low) / abs(high - low))
