"""Where the neurons of an answer lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..plots import OKABE_ITO, figure_of, finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_neurons(
    scores: np.ndarray, neurons: Sequence[tuple[int, int]], answer: str, path: str | Path | None = None
) -> Figure:
    """Above: how many of the (layer, neuron)s each layer has; below: the highest of its scores [layers, neurons]."""
    layers = np.arange(len(scores))
    count = Counter(layer for layer, _ in neurons)
    figure = figure_of(max(3.2, 0.16 * len(layers) + 1.4), 3.2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.bar(layers, [count[layer] for layer in layers], color=OKABE_ITO[0])
    lower.bar(layers, scores.max(1), color=OKABE_ITO[1])
    shown = answer.strip().replace("$", r"\$")
    upper.set_title(f"{len(neurons)} knowledge neurons of '{shown}'", fontsize=9)
    for axes, label in ((upper, "neurons"), (lower, "highest score")):
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
    lower.set_xlabel("layer", fontsize=8)
    return finish(figure, path)
