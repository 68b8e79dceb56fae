"""How results show themselves in a notebook: tables of HTML in the colours of figures, with values to hover over."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from .runs.interrupts import imported


def html_table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    colours: Sequence[Sequence[str]] | None = None,
    hover: Sequence[Sequence[str]] | None = None,
) -> str:
    """The first column names the row. colours, hover: CSS and text of each further cell [rows, columns - 1]."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    lines = []
    for n, (name, *cells) in enumerate(rows):
        line = [f'<th scope="row" style="text-align:left">{escape(_shown(name))}</th>']
        for k, cell in enumerate(cells):
            style = "" if colours is None else f' style="{colours[n][k]}"'
            told = "" if hover is None else f' title="{escape(hover[n][k])}"'
            line.append(f"<td{style}{told}>{escape(_shown(cell))}</td>")
        lines.append(f"<tr>{''.join(line)}</tr>")
    caption = f'<caption style="text-align:left">{escape(caption)}</caption>'
    body = f"{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div style="overflow-x:auto"><table>{body}</table></div>'


def shades(effects: np.ndarray, colours: str, reach: float | None = None) -> list[list[str]]:
    """CSS of each effect [rows, columns]: white for none, as strong either way; letters that are read on it.

    colours: a diverging colour map. reach: the effect that is strongest; None: the largest there is.
    """
    shown = np.nan_to_num(effects)
    reach = reach or float(np.abs(shown).max(initial=0.0)) or 1.0
    rgb = imported("matplotlib").colormaps[colours](0.5 + shown / (2 * reach))[..., :3]
    light = rgb @ np.array([0.299, 0.587, 0.114]) > 0.55
    return [
        [
            f"background:rgb({','.join(str(round(255 * x)) for x in cell)});color:{'#000' if bright else '#fff'}"
            for cell, bright in zip(row, line, strict=True)
        ]
        for row, line in zip(rgb, light, strict=True)
    ]


def _shown(value: Any) -> str:
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return ""
    return f"{round(value, 2) + 0.0:.2f}" if isinstance(value, float) else str(value)  # no -0.00
