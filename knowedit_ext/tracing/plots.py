"""Figures in the papers' style; maps are of one hue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..plots import MARKERS, OKABE_ITO, figure_of, finish
from .trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .effects import Effects, KindEffects

COLOUR_MAPS = {"state": "Purples", "mlp": "Greens", "attn": "Reds"}
NAMES = {"state": "state", "mlp": "MLP", "attn": "attention"}


def plot_trace(trace: Trace, path: str | Path | None = None, *, title: str | None = None) -> Figure:
    """Heat map tokens x layers of one trace; subject tokens carry a star. The scale begins at the corrupted score."""
    tokens, layers = trace.scores.shape
    figure = figure_of(max(4.0, 0.14 * layers + 2.2), max(2.2, 0.19 * tokens + 1.2))
    axes = figure.add_subplot()
    top = max(float(np.nanmax(trace.scores)), trace.low_score + 1e-6)
    first, last = trace.subject_range
    labels = [_readable(t) + ("*" if first <= n < last else "") for n, t in enumerate(trace.tokens)]
    _heat_map(axes, trace.scores, labels, trace.kind, trace.low_score, top, trace.window)
    if title is None:
        what = "restoring state" if trace.kind == "state" else f"restoring {NAMES[trace.kind]}"
        title = f"Impact of {what} after corrupted input"
    axes.set_title(title, fontsize=9)
    unit = {"logprob": "log p", "logit_difference": "logit difference"}.get(str(trace.settings.get("score")), "p")
    bar = figure.colorbar(axes.collections[0], ax=axes)
    bar.set_label(f"{unit}({_readable(trace.answer).strip()})", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return finish(figure, path)


def plot_effects(effects: Effects, path: str | Path | None = None, style: str = "lines") -> Figure:
    """AIE by layer and token role, a panel a kind: "lines" with 95 % confidence bands, or "heatmap"."""
    if style not in ("lines", "heatmap"):
        raise ValueError(f"unknown style '{style}': expected 'lines' or 'heatmap'")
    if not effects.kinds:
        raise ValueError("no traces to plot: the model predicted none of the facts")
    kinds = list(effects.kinds.values())
    figure = figure_of(4.6 * len(kinds), 3.4)
    panels = figure.subplots(1, len(kinds), sharey=style == "lines", squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        (_lines if style == "lines" else _role_map)(axes, kind)
        what = "a single state" if kind.kind == "state" else f"{kind.window} {NAMES[kind.kind]} layers"
        axes.set_title(f"AIE of {what}, {kind.cases} prompts", fontsize=9)
    if style == "lines":
        panels[0].set_ylabel("average indirect effect", fontsize=8)
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
        )
    return finish(figure, path)


def _lines(axes: Axes, kind: KindEffects) -> None:
    from .effects import ROLES

    x = np.arange(kind.layers)
    for role, colour, marker in zip(ROLES, OKABE_ITO, MARKERS, strict=True):
        mean = kind.aie.get(role)
        if mean is None:
            continue
        y = np.array(mean.mean)
        axes.plot(
            x, y, color=colour, marker=marker, markersize=3, linewidth=1.2, markevery=max(1, len(x) // 8), label=role
        )
        if mean.half_width is not None:
            half = np.array(mean.half_width)
            axes.fill_between(x, y - half, y + half, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(0, color="0.7", linewidth=0.6)
    _layer_axis(axes, kind.layers, kind.kind, kind.window, offset=0.0)
    axes.tick_params(labelsize=7)


def _role_map(axes: Axes, kind: KindEffects) -> None:
    values = np.array([mean.mean for mean in kind.aie.values()]).clip(min=0)
    _heat_map(axes, values, list(kind.aie), kind.kind, 0.0, max(values.max(), 1e-6), kind.window)
    axes.figure.colorbar(axes.collections[0], ax=axes).ax.tick_params(labelsize=7)


def _heat_map(
    axes: Axes, values: np.ndarray, labels: list[str], kind: str, low: float, high: float, window: int
) -> None:
    axes.pcolormesh(values, cmap=COLOUR_MAPS[kind], vmin=low, vmax=high)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(values)) + 0.5, labels, fontsize=7)
    _layer_axis(axes, values.shape[1], kind, window, offset=0.5)


def _layer_axis(axes: Axes, layers: int, kind: str, window: int, offset: float) -> None:
    ticks = np.arange(0, layers, max(1, round(layers / 10)))
    axes.set_xticks(ticks + offset, [str(t) for t in ticks], fontsize=7)
    text = "single restored layer" if kind == "state" else f"centre of {window} restored {NAMES[kind]} layers"
    axes.set_xlabel(text, fontsize=8)


def _readable(token: str) -> str:
    """A token as a label: line breaks shown, no characters that would be drawn as maths or boxes."""
    return token.replace("\n", "\\n").replace("\t", "\\t").replace("$", r"\$").replace("\ufffd", "·")
