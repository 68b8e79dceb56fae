"""What the figures of studies share: looks of lines, bands, bars, heat maps and legends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plots import MARKERS, OKABE_ITO
from ..runs.interrupts import imported

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

LABEL, SMALL = 8, 7  # of texts, in points
ENTRY = 1.3  # of a legend, in inches
DASHES = ("-", "--", ":")
Band = tuple[Sequence[float], Sequence[float]]  # from, to


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of a line, told apart without colour vision."""
    colour, dashes = OKABE_ITO[number % len(OKABE_ITO)], DASHES[number // len(OKABE_ITO) % len(DASHES)]
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "linestyle": dashes}


def line(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    number: int,
    label: str | None = None,
    band: Band | None = None,
    shade: float = 0.15,
) -> None:
    """A line of a panel, the `number`-th there is, with what its band spans."""
    axes.plot(x, y, label=label, linewidth=1, markersize=3, **look(number))
    if band is not None:
        axes.fill_between(x, *band, color=look(number)["color"], alpha=shade, linewidth=0)


def line_of_rows(axes: Axes, rows: Sequence[Mapping[str, Any]], x: str, y: str, number: int, label: str) -> None:
    """Rows' means against their x, with the 95 % band that they have ("Y_half")."""
    rows = sorted((row for row in rows if row.get(y) is not None), key=lambda row: row[x])
    if rows:
        mean = np.array([row[y] for row in rows])
        half = np.array([row.get(f"{y}_half") or 0.0 for row in rows])
        line(axes, [row[x] for row in rows], mean, number, label, (mean - half, mean + half))


def grouped_bars(
    axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[tuple[float, float]]], first: int = 0
) -> None:
    """series: label -> (height, half width of its interval) of each group. first: the look of the first of them."""
    width = 0.8 / max(1, len(series))
    for number, (label, values) in enumerate(series.items()):
        x = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
        heights, halves = zip(*values, strict=True)
        axes.bar(
            x,
            heights,
            width,
            yerr=halves,
            color=look(first + number)["color"],
            label=label,
            error_kw={"linewidth": 0.6},
        )
    crowded = sum(map(len, groups)) > 9 * axes.figure.get_figwidth()
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(len(groups)), groups, fontsize=SMALL, **turned)


def log_scale(axis: Axis, at: Sequence[float] | None = None) -> None:
    """Powers of ten apart, numbers written out. at: where there are ticks."""
    tickers = imported("matplotlib.ticker")
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(tickers.LogLocator(subs=(1, 2, 5)) if at is None else tickers.FixedLocator(at))
    axis.set_major_formatter(tickers.StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(tickers.NullLocator())


def name_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """(x, y, name): what lies at one place has its names on one line, beside the place and within the panel."""
    names: dict[tuple[float, float], dict[str, None]] = {}
    for x, y, name in points:
        names.setdefault((round(x, 6), round(y, 6)), {})[name] = None
    middle = sum(axes.get_xlim()) / 2
    for place, here in names.items():
        left = place[0] > middle
        axes.annotate(
            ", ".join(here), place, (-5 if left else 5, 0), textcoords="offset points",
            ha="right" if left else "left", va="center", fontsize=SMALL - 1,
        )  # fmt: skip


def heat_map(figure: Figure, axes: Axes, values: np.ndarray, reach: float | None = None) -> None:
    """[rows, columns]. reach: of a signed scale, white is 0 and colours go as far to either side; None: from 0 up."""
    limits = {"cmap": "Blues", "vmin": 0.0} if reach is None else {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach}
    bar = figure.colorbar(axes.pcolormesh(values, **limits), ax=axes)
    bar.ax.tick_params(labelsize=SMALL)
    axes.set_xticks(np.arange(0, values.shape[1], max(1, values.shape[1] // 10)) + 0.5)
    axes.set_xticklabels([str(int(x)) for x in axes.get_xticks()])
    axes.set_yticks(np.arange(0, values.shape[0], max(1, values.shape[0] // 10)) + 0.5)
    axes.set_yticklabels([str(int(y)) for y in axes.get_yticks()])
    axes.tick_params(labelsize=SMALL)


def named(axes: Axes, x: str | None = None, y: str | None = None, title: str | None = None) -> Axes:
    """A panel's labels."""
    if x is not None:
        axes.set_xlabel(x, fontsize=LABEL)
    if y is not None:
        axes.set_ylabel(y, fontsize=LABEL)
    if title is not None:
        axes.set_title(title, fontsize=LABEL)
    axes.tick_params(which="both", labelsize=SMALL)
    return axes


def legend(figure: Figure) -> None:
    """One for all panels, of what the first of them shows."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = max(1, int(figure.get_figwidth() / ENTRY))
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=SMALL, frameon=False)
