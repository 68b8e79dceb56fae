"""What all figures share: colours readable without colour vision, no global state, files written atomically."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from .runs.interrupts import imported

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OKABE_ITO = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#999999", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "x")


def figure_of(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    figure = imported("matplotlib.figure")  # no pyplot: no global state, no display needed
    return figure.Figure(figsize=(width, height), dpi=200, layout="constrained")


def figure_format(path: str | Path) -> str:
    """ "png", "pdf" or "svg", as the file's name says; ValueError for another name."""
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in ("png", "pdf", "svg"):
        raise ValueError(f"'{path}': a figure is written as .png, .pdf or .svg")
    return suffix


def finish(figure: Figure, path: str | Path | None) -> Figure:
    """Write the figure where a path is given; the same figure gives the same bytes."""
    if path is None:
        return figure
    from .runs.files import atomic_write  # with torch; `figure_format` is asked before it is needed

    suffix = figure_format(path)
    drawn = io.BytesIO()
    undated = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[suffix]
    figure.savefig(drawn, format=suffix, metadata=undated)
    atomic_write(path, lambda file: file.write(drawn.getvalue()))
    return figure
