"""Figures in the papers' style. Maps are white where nothing is restored, of the kind's hue where the answer comes back
and of the opposite hue where it becomes less likely still; grey where nothing was traced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from ..plots import COLUMN, MARKERS, OKABE_ITO, PAGE, drawn_text, figure_of, finish
from .kinds import KINDS, Kind
from .roles import ROLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .effects import Effects, KindEffects
    from .trace import Trace

LEAST = 1e-6  # half the length of a scale on which every effect is nothing
UNITS = {"probability": "p", "logprob": "log p", "logit_difference": "logit difference"}


def plot_trace(
    trace: Trace, path: str | Path | None = None, *, title: str | None = None, scale: str | None = None
) -> Figure:
    """Heat map tokens x layers of one trace; subject tokens carry a star. The corrupted score is white.

    title: None: the prompt with its answer, and what is restored. scale: what the colours say; None: p(answer).
    """
    tokens, layers = trace.scores.shape
    kind = KINDS[trace.kind]
    figure = figure_of(max(COLUMN, 0.11 * layers + 1.9), max(2.2, 0.17 * tokens + 1.3))
    axes = figure.add_subplot()
    first, after = trace.subject_range
    labels = [drawn_text(t) + ("*" if first <= n < after else "") for n, t in enumerate(trace.tokens)]
    _heat_map(axes, trace.scores, labels, kind, trace.window, trace.low_score, _reach([trace.indirect_effect]))
    asked = drawn_text(f"{''.join(trace.tokens).strip()} →{trace.answer}")
    title = title or f"{asked}\nrestored: {kind.label}, the subject* corrupted"
    letters = int(12 * figure.get_figwidth())  # of a line
    axes.set_title("\n".join(fill(line, letters) for line in title.split("\n")), fontsize=8)
    bar = _colour_bar(figure, axes, [trace.scores], trace.low_score)
    unit = UNITS.get(str(trace.settings.get("score")), "p")
    bar.set_label(scale or f"{unit}({drawn_text(trace.answer).strip()})", fontsize=8)
    return finish(figure, path)


def plot_effects(effects: Effects, path: str | Path | None = None, style: str = "lines") -> Figure:
    """AIE by layer and token role, a panel a kind: "lines" with 95 % confidence bands, or "heatmap", whose panels share
    one scale."""
    if style not in ("lines", "heatmap"):
        raise ValueError(f"unknown style '{style}': expected 'lines' or 'heatmap'")
    if not effects.kinds:
        raise ValueError("no traces to plot: the model predicted none of the facts")
    kinds = list(effects.kinds.values())
    figure = figure_of(COLUMN if len(kinds) == 1 else PAGE, 2.9)
    panels = figure.subplots(1, len(kinds), sharey=style == "lines", squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        row = KINDS[kind.kind]
        what = f"{kind.window} {row.label} layers" if row.windowed else f"a single {row.label}"
        axes.set_title(f"AIE of {what}\n{kind.cases} prompt{'s' * (kind.cases != 1)}", fontsize=8)
    (_lines if style == "lines" else _role_maps)(figure, panels, kinds)
    return finish(figure, path)


def _lines(figure: Figure, panels: Sequence[Axes], kinds: Sequence[KindEffects]) -> None:
    for axes, kind in zip(panels, kinds, strict=True):
        x = np.arange(kind.layers)
        for role, colour, marker in zip(ROLES, OKABE_ITO, MARKERS, strict=True):
            mean = kind.aie.get(role)
            if mean is None:
                continue
            y, every = np.array(mean.mean), max(1, len(x) // 8)
            axes.plot(x, y, color=colour, marker=marker, markersize=3, linewidth=1.2, markevery=every, label=role)
            if mean.half_width is not None:
                half = np.array(mean.half_width)
                axes.fill_between(x, y - half, y + half, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(0, color="0.7", linewidth=0.6)
        _layer_axis(axes, kind.layers, KINDS[kind.kind], kind.window, offset=0.0)
        axes.tick_params(labelsize=7)
    panels[0].set_ylabel("average indirect effect", fontsize=8)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3 if len(kinds) > 1 else 2,
        fontsize=7,
        frameon=False,
    )


def _role_maps(figure: Figure, panels: Sequence[Axes], kinds: Sequence[KindEffects]) -> None:
    maps = [np.array([mean.mean for mean in kind.aie.values()]) for kind in kinds]
    reach = _reach(maps)
    for axes, kind, values in zip(panels, kinds, maps, strict=True):
        _heat_map(axes, values, list(kind.aie), KINDS[kind.kind], kind.window, 0.0, reach)
        if axes is not panels[0]:
            axes.set_yticklabels([])
        _colour_bar(figure, axes, maps, 0.0)
    if any(list(kind.aie) != list(kinds[0].aie) for kind in kinds):  # a role that only some kinds were traced at
        for axes, kind in zip(panels, kinds, strict=True):
            axes.set_yticklabels(list(kind.aie))


def _reach(effects: Sequence[np.ndarray]) -> float:
    """The largest effect of either sign: scales go as far both ways, so that equal effects are equally strong."""
    return max(LEAST, *(float(np.nanmax(np.abs(x), initial=0.0)) for x in effects))


def _heat_map(
    axes: Axes, values: np.ndarray, labels: list[str], kind: Kind, window: int, centre: float, reach: float
) -> None:
    axes.set_facecolor("0.85")  # seen where values are NaN
    axes.pcolormesh(values, cmap=kind.colours, vmin=centre - reach, vmax=centre + reach)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(values)) + 0.5, labels, fontsize=7)
    _layer_axis(axes, values.shape[1], kind, window, offset=0.5)


def _colour_bar(figure: Figure, axes: Axes, shown: Sequence[np.ndarray], centre: float):
    """Only the part of the scale that the values of all panels take up, zero effect included."""
    bar = figure.colorbar(axes.collections[0], ax=axes)
    low, high = (float(f([f(x) for x in shown] + [centre])) for f in (np.nanmin, np.nanmax))
    bar.ax.set_ylim(low, max(high, low + LEAST))
    bar.ax.tick_params(labelsize=7)
    return bar


def _layer_axis(axes: Axes, layers: int, kind: Kind, window: int, offset: float) -> None:
    ticks = np.arange(0, layers, max(1, round(layers / 10)))
    axes.set_xticks(ticks + offset, [str(t) for t in ticks], fontsize=7)
    axes.set_xlabel(f"centre of {window} restored layers" if kind.windowed else "restored layer", fontsize=8)
