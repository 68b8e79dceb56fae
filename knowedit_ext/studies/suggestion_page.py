"""The page of a search for settings: what was found beside what is known, S by layer with tracing, every candidate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..editing.methods import method_of
from ..pages.charts import bars, line
from ..pages.page import Chart, Measured, Page, Record, Table
from .findings import HALF
from .suggest_trials import SCORES
from .suggestion import BEGUN_FROM, SUGGESTED, best_at, panel_title

if TYPE_CHECKING:
    from .suggestion import Suggestion

MEASURES = ("S", *SCORES)
GREY = "#999999"
HIGH = 20  # lines of text, for which charts of two panels are made higher
Row = Mapping[str, Any]


def suggestion_page(found: Suggestion) -> Page:
    names = _names(found)
    held = [row | {"candidate": names.get(_key(row), row["candidate"])} for row in found.held]
    charts = [_scores(found, f"Records that the search did not see ({held[0]['records']})", held)]
    charts += _known(found, names)
    charts += [_by_layer(found, name) for name in ("size", *found.settings["ranges"])]
    columns = ["layers", "round", "what", *found.settings["ranges"], "records", *MEASURES, "seconds"]
    rows = [[_value({"what": names.get(_key(row))} | row, name) for name in columns] for row in found.rows]
    opened = [
        Record("The suggested parameters (params.json)", (), _json(found.params.to_dict())),
        Record("What was searched", (), _json(found.settings)),
    ]
    caption = "Every candidate in every round (± half of a 95 % interval over records)"
    return Page(f"Settings for {found.method}", found.lead(), charts, [Table(caption, columns, rows)], opened)


def _names(found: Suggestion) -> dict[str, str]:
    """What known candidates are called: the suggested, what was begun from, presets."""
    method, names = method_of(found.method), {}
    for preset in method.presets:
        names.setdefault(_json(method.params_of(preset).to_dict()), []).append(f"preset {preset}")
    names.setdefault(_json(found.settings["begun_from"]), []).insert(0, BEGUN_FROM)
    names.setdefault(_json(found.params.to_dict()), []).insert(0, SUGGESTED)
    return {params: ", ".join(each) for params, each in names.items()}


def _known(found: Suggestion, names: Mapping[str, str]) -> list[Chart]:
    """The suggested beside presets, on the records of the first round: the only ones that all of them were tried on."""
    first = [row for row in found.rows if row["round"] == 1 and row["S"] is not None]
    known = [row | {"candidate": names[_key(row)]} for row in first if _key(row) in names]
    if len(known) < 2 or not any("preset" in row["candidate"] for row in known):
        return []
    known.sort(key=lambda row: not row["candidate"].startswith(SUGGESTED))
    return [_scores(found, f"Presets, on the first records of the search ({known[0]['records']})", known)]


def _scores(found: Suggestion, title: str, rows: Sequence[Row]) -> Chart:
    """A group a measure, a bar a candidate, with intervals."""
    traces = []
    for number, row in enumerate(rows):
        told = [_said(row["candidate"], name, row) for name in MEASURES]
        values, half = [row.get(name) for name in MEASURES], [row.get(name + HALF) for name in MEASURES]
        traces.append(bars(number, row["candidate"], MEASURES, values, half, told))
    layout = {"yaxis": {"title": {"text": "%"}, "range": [0, 102]}, "barmode": "group", "showlegend": True}
    columns = ["candidate", "layers", *found.settings["ranges"], "records", *MEASURES]
    table = Table(f"{title}, ± half of a 95 % interval", columns, [[_value(row, n) for n in columns] for row in rows])
    return Chart(title, traces, layout, [table])


def _by_layer(found: Suggestion, name: str) -> Chart:
    """A line a value of one parameter; below it the tracing effect, over the same layers."""
    title = panel_title(name)
    traces, rows = [], []
    for number, (value, best) in enumerate(best_at(found.rows, name)):
        said = [_said(f"{title} {value}, last layer {last}", "S", row) + f"; {_settings(found, row)}"
                for last, row in best.items()]  # fmt: skip
        heights, half = [row["S"] for row in best.values()], [row["S" + HALF] for row in best.values()]
        traces.append(line(number, value, list(best), heights, half, said))
        rows += [[value, last, _value(row, "S"), _settings(found, row)] for last, row in best.items()]
    deepest = max(row["last"] for row in found.rows)
    tables = [Table(f"Best S of the first round by {title}", [title, "last layer", "S", "settings"], rows)]
    layout = {
        "xaxis": {"title": {"text": "last layer of the window"}, "dtick": max(1, round(deepest / 10))},
        "yaxis": {"title": {"text": "best S"}},
        "legend": {"title": {"text": title}},
        "showlegend": True,
    }
    if found.effect is None:
        return Chart(f"S by {title}", traces, layout, tables)
    effect = found.effect["effect"]
    layers, what = list(range(len(effect))), f"tracing effect of MLPs, {found.effect['facts']} facts"
    said = [f"layer {layer}: average indirect effect {x:.4f}" for layer, x in enumerate(effect)]
    traced = bars(0, what, layers, effect, [None] * len(effect), said)
    traces.append(traced | {"yaxis": "y2", "marker": {"color": GREY}})
    layout["xaxis"] |= {"anchor": "y2", "title": {"text": "layer (of windows: the last)"}}
    layout["yaxis"]["domain"] = [0.42, 1]
    layout["yaxis2"] = {"domain": [0, 0.3], "title": {"text": "effect"}}
    tables.append(
        Table(f"Average indirect effect: {what}", ["layer", "effect"], list(zip(layers, effect, strict=True)))
    )
    return Chart(f"S by {title}, and tracing", traces, layout, tables, rows=HIGH)


def _settings(found: Suggestion, row: Row) -> str:
    return ", ".join([f"layers {row['layers']}", *(f"{name} {_value(row, name)}" for name in found.settings["ranges"])])


def _said(name: str, measure: str, row: Row) -> str:
    value, half = row.get(measure), row.get(measure + HALF)
    if value is None:
        return ""
    return f"{name}: {measure} {value:.1f}{'' if half is None else f' ± {half:.1f}'} ({row['records']} records)"


def _value(row: Row, name: str) -> Any:
    value, half = row.get(name), row.get(name + HALF)
    if value is not None and half is not None:
        return Measured(value, half)
    return value if value is None or isinstance(value, (str, float, int)) else str(value)


def _key(row: Row) -> str:
    return _json(row["params"])


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, default=str)
