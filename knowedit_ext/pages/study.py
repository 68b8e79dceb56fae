"""The page of a study: its rows as a table, and a chart a measure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..datasets.relations import relation_name
from ..studies.edit_sets import UNEDITED
from ..studies.findings import HALF
from .charts import bars, level, line
from .page import Chart, Measured, Page, Record, Table

AXES = ("layer", "edits", "n")  # what lines go over, the first that rows differ in
TOLD_APART = ("head", "first", "seed")  # columns that tell rows apart where they differ, beside a study's own
Rows = Sequence[Mapping[str, Any]]


def study_page(
    title: str,
    rows: Rows,
    keys: Sequence[str],
    settings: Mapping[str, Any],
    lead: str = "",
    labels: Mapping[str, str] | None = None,
    split: str | None = None,
) -> Page:
    """rows: tidy, of a mean also half the width of its interval ("ES", "ES_half"). keys: columns that tell rows apart.
    labels: of measures, where they are called otherwise than their column. split: a column; a chart for each value.

    Lines over the first of `AXES` in which rows differ; rows without it, and the unedited model, are levels. Else bars.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    axis = next((name for name in AXES if len(_values(rows, name)) > 1), None)
    apart = [n for n in columns if _tells_apart(rows, n, keys) and n != axis]
    measures = [name for name in columns if _is_measure(rows, name, (*keys, *AXES))]
    charts = [
        _chart(part, name, f"{(labels or {}).get(name, name)}{value}", axis, [n for n in apart if n != split])
        for name in measures
        for value, part in _parts(rows, split)
    ]
    ordered = [name for name in keys if name in columns] + [name for name in columns if name not in keys]
    shown = [name for name in ordered if not all(isinstance(row.get(name), (Mapping, list)) for row in rows)]
    shown = [name for name in shown if name.removesuffix(HALF) not in measures or name in measures]
    caption = "All rows" + (" (± half of a 95 % interval)" if any(name.endswith(HALF) for name in columns) else "")
    table = Table(caption, shown, [[_cell(row, name) for name in shown] for row in rows])
    asked = Record("Settings", (), json.dumps(settings, indent=1, sort_keys=True, default=str))
    return Page(title, lead, charts, [table], [asked] if settings else [], switch="Measure")


def _parts(rows: Rows, split: str | None) -> list[tuple[str, Rows]]:
    if split is None:
        return [("", rows)]
    values = list(dict.fromkeys(row[split] for row in rows))
    return [(f", {value}".replace("_", " "), [row for row in rows if row[split] == value]) for value in values]


def _cell(row: Mapping[str, Any], name: str) -> Any:
    value, half = row.get(name), row.get(name + HALF)
    if value is not None and half is not None:
        return Measured(value, half)
    return relation_name(value) if isinstance(value, str) else value


def _values(rows: Rows, name: str) -> set[Any]:
    return {row[name] for row in rows if row.get(name) is not None and not isinstance(row[name], (Mapping, list))}


def _tells_apart(rows: Rows, name: str, keys: Sequence[str]) -> bool:
    values = _values(rows, name)
    return len(values) > 1 and (name in keys or name in TOLD_APART and not any(isinstance(x, float) for x in values))


def _is_measure(rows: Rows, name: str, keys: Sequence[str]) -> bool:
    return name not in keys and not name.endswith(HALF) and any(isinstance(row.get(name), float) for row in rows)


def _chart(rows: Rows, measure: str, label: str, axis: str | None, apart: Sequence[str]) -> Chart:
    rows = [row for row in rows if row.get(measure) is not None]
    y = {"title": {"text": label}}
    if axis is None:
        return Chart(label, _bars(rows, measure, label, apart), {"yaxis": y, "barmode": "group"})
    over = sorted(_values(rows, axis))
    traces = []
    for number, (name, each) in enumerate(_series(rows, apart).items()):
        placed = sorted((row for row in each if row.get(axis) is not None), key=lambda row: row[axis])
        placed = placed if any(row.get("method") != UNEDITED for row in each) else []
        if placed:
            said = [_said(name, measure, row, axis) for row in placed]
            half = [row.get(measure + HALF) for row in placed]
            x, heights = [row[axis] for row in placed], [row[measure] for row in placed]
            traces.append(line(number, name or label, x, heights, half, said))
        elif over:
            said = _said(name, measure, each[0], None)
            traces.append(level(number, name, [over[0], over[-1]], each[0][measure], said))
    scale = {"type": "log"} if axis == "n" and over and over[0] > 0 else {}
    return Chart(label, traces, {"xaxis": {"title": {"text": axis}} | scale, "yaxis": y, "showlegend": True})


def _bars(rows: Rows, measure: str, label: str, apart: Sequence[str]) -> list[dict[str, Any]]:
    """A group a value of the last column that tells rows apart, a bar of it for each of the others."""
    *others, group = apart or ("",)
    traces = []
    for number, (name, each) in enumerate(_series(rows, others).items()):
        groups = [_shown(row.get(group), label) for row in each]
        said = [_said(", ".join(filter(None, (name, place))), measure, row, None)
                for place, row in zip(groups, each, strict=True)]  # fmt: skip
        half = [row.get(measure + HALF) for row in each]
        traces.append(bars(number, name or label, groups, [row[measure] for row in each], half, said))
    return traces


def _series(rows: Rows, names: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        told = ", ".join(_told(name, row[name]) for name in names if row.get(name) is not None)
        series.setdefault(told, []).append(row)
    return series


def _told(name: str, value: Any) -> str:
    """A number is told with what it counts."""
    return relation_name(value) if isinstance(value, str) else f"{name} {value}"


def _shown(value: Any, otherwise: str = "") -> str:
    return otherwise if value is None else relation_name(str(value))


def _said(name: str, measure: str, row: Mapping[str, Any], axis: str | None) -> str:
    where = "" if axis is None else f", {axis} {row[axis]}"
    half = row.get(measure + HALF)
    return f"{name}{where}: {measure} {row[measure]:.4g}{'' if half is None else f' ± {half:.2g}'}".removeprefix(", ")
