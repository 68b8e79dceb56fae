"""Success by relation, readable without colour vision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from ..datasets.relations import relation_name
from ..plots import COLUMN, MARKERS, OKABE_ITO, drawn_text, figure_of, finish
from .mean import Mean
from .scores import SUCCESSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .before_after import BeforeAfter

MOST_PROMPTS, MOST_TOKENS = 6, 4  # of a figure, and of a side in a panel
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
    labels = [f"{relation_name(name)}, n = {_count(row)}" for name, row in shown.items()]
    axes.set_yticks(range(len(shown)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)
    axes.set_xlabel("success, %", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    if shown:
        figure.legend(loc="outside upper center", ncols=len(SUCCESSES), fontsize=7, frameon=False)
    return finish(figure, path)


def plot_before_after(said: BeforeAfter, path: str | Path | None = None) -> Figure:
    """A panel a prompt: the likeliest next tokens before an edit, and after it beside them."""
    sides = {"before": said.before} | ({} if said.after is None else {"after": said.after})
    shown = said.prompts[:MOST_PROMPTS]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = figure_of(COLUMN * columns, 2.1 * rows + 0.3)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for n, (axes, prompt) in enumerate(zip(panels, shown, strict=False)):
        tokens = list(dict.fromkeys(t for each in sides.values() for t in each[n].chances(MOST_TOKENS)))
        height = 0.8 / len(sides)
        for number, (side, each) in enumerate(sides.items()):
            chances = each[n].chances()
            places = [y + height * (number - (len(sides) - 1) / 2) for y in range(len(tokens))]
            hatch = "" if number == 0 else "////"
            width = [chances.get(token, 0.0) for token in tokens]
            axes.barh(places, width, height, color=OKABE_ITO[number], hatch=hatch, edgecolor="w", label=side)
        axes.set_yticks(range(len(tokens)), [drawn_text(token) for token in tokens], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(fill(drawn_text(prompt), 40), fontsize=8)
        axes.set_xlabel("p(next token)", fontsize=7)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=7, frameon=False
    )
    return finish(figure, path)


def _count(row: Mapping[str, Mean]) -> int:
    return max(mean.n for mean in row.values())
