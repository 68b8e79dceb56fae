"""Success by relation, readable without colour vision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..plots import MARKERS, OKABE_ITO, figure_of, finish
from .mean import Mean
from .scores import SUCCESSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {"ES": "efficacy", "PS": "paraphrase", "NS": "neighbourhood"}


def plot_relations(rows: Mapping[str, Mapping[str, Mean]], path: str | Path | None = None) -> Figure:
    """A line a relation, a marker with its standard error for each of ES, PS and NS."""
    shown = {name: row for name, row in rows.items() if any(s in row for s in SUCCESSES)}
    figure = figure_of(5.2, max(1.6, 0.24 * len(shown) + 1.0))
    axes = figure.add_subplot()
    for number, success in enumerate(SUCCESSES):
        points = [(y, row[success]) for y, row in enumerate(shown.values()) if success in row]
        if points:
            axes.errorbar(
                [mean.mean for _, mean in points],
                [y + 0.18 * (number - 1) for y, _ in points],
                xerr=[mean.stderr or 0.0 for _, mean in points],
                fmt=MARKERS[number], markersize=4, linewidth=1, color=OKABE_ITO[number], label=LABELS[success],
            )  # fmt: skip
    axes.set_yticks(range(len(shown)), [f"{name} ({_count(row)})" for name, row in shown.items()], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)
    axes.set_xlabel("success, %", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    if shown:
        axes.legend(fontsize=7, loc="best")
    return finish(figure, path)


def _count(row: Mapping[str, Mean]) -> int:
    return max(mean.n for mean in row.values())
