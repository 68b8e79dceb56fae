"""What stands on the pages of traces, of a data set's effects, and of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..datasets.questions import asked_texts, rewrites_of
from ..runs.interrupts import imported
from .charts import bars, line
from .page import Chart, Page, Record, Table

if TYPE_CHECKING:
    from ..evaluation.report import Report
    from ..tracing.effects import Effects
    from ..tracing.trace import Trace

LEAST = 1e-6  # of a scale
NORMAL = 1.96
SHADES = 41
# what a prompt's answers are called; a prompt with one answer of its own has the last
ANSWERS = {"target_new": "new", "target_true": "true", "target": "own answer"}
NO_SHARES = ("EM", "PM", "NM", "GE", "RS", "essence")  # columns that are no share of prompts


def trace_page(traces: Sequence[Trace]) -> Page:
    """Of one prompt, a map a kind, all on one scale; a click on a cell shows its noise samples and their interval."""
    from ..plots import shown_text

    first = traces[0]
    prompt = "".join(first.tokens)
    if any("".join(trace.tokens) != prompt for trace in traces):
        raise ValueError("a page of several traces is of one prompt")
    lead = (
        f"The answer {first.answer!r} has {first.high_score:.3f} in the clean run and {first.low_score:.3f} with the "
        "subject (marked *) corrupted. Each cell: the score when something of the clean run is restored there."
    )
    shown = [x for trace in traces for x in (trace.low_score, *trace.scores[np.isfinite(trace.scores)])]
    scale = min(shown), max(*shown, min(shown) + LEAST)
    charts = [_map(trace, *scale) for trace in traces]
    return Page(f"{shown_text(prompt)} →{shown_text(first.answer)}", lead, charts, switch="What is restored")


def _map(trace: Trace, low: float, high: float) -> Chart:
    from ..plots import shown_text
    from ..tracing.kinds import KINDS

    kind = KINDS[trace.kind]
    first, after = trace.subject_range
    tokens = [f"{n} {shown_text(t)}{'*' if first <= n < after else ''}" for n, t in enumerate(trace.tokens)]
    layers = [f"layer {n}" for n in range(trace.scores.shape[1])]
    half = NORMAL * trace.standard_error
    heat = {
        "type": "heatmap",
        "z": _plain(trace.scores),
        "x": list(range(len(layers))),
        "y": tokens,
        "customdata": [[_cell(trace, n, layer, half) for layer in range(len(layers))] for n in range(len(tokens))],
        "colorscale": _colours(kind.colours, low, trace.low_score, high),
        "zmin": low,
        "zmax": high,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"title": {"text": "score", "side": "right"}, "thickness": 14},
    }
    layout = {
        "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False},
        "xaxis": {"title": {"text": "layer"}, "dtick": max(1, round(len(layers) / 7)), "showgrid": False},
        "margin": {"t": 10, "l": 10, "r": 10, "b": 50},
    }
    rows = [[token, *row] for token, row in zip(tokens, _plain(trace.scores), strict=True)]
    what = f"{kind.label}, {trace.window} layers around each" if kind.windowed else f"one {kind.label}"
    return Chart(what, [heat], layout, [Table(f"Scores: {what}", ["token", *layers], rows)], rows=len(tokens))


def _colours(name: str, low: float, middle: float, high: float) -> list[list[Any]]:
    """The part of a diverging scale from `low` to `high`: white in the middle, as strong for as much either way."""
    reach = max(middle - low, high - middle)
    places = np.linspace((low - middle) / reach, (high - middle) / reach, SHADES) / 2 + 0.5
    colours = imported("plotly.colors").sample_colorscale(name, places.clip(0, 1).tolist())
    return [[n / (SHADES - 1), colour] for n, colour in enumerate(colours)]


def _cell(trace: Trace, n: int, layer: int, half: np.ndarray) -> str:
    score = f"{trace.tokens[n]!r}, layer {layer}: {trace.scores[n, layer]:.4f}"
    if math.isfinite(half[n, layer]):
        score += f" ± {half[n, layer]:.4f} (95 %)"
    samples = [f"{x:.3f}" for x in trace.sample_scores[:, n, layer]] if len(trace.sample_scores) else []
    samples = [x for x in samples if x != "nan"]
    return score + (f"; noise samples {', '.join(samples)}" if samples else "")


def effects_page(effects: Effects) -> Page:
    """By kind the average indirect effect of each token role over the layers, with 95 % intervals."""
    from ..tracing.kinds import KINDS

    charts = []
    for kind in effects.kinds.values():
        layers = list(range(kind.layers))
        lines, rows = [], []
        for number, (role, mean) in enumerate(kind.aie.items()):
            half = mean.half_width or [None] * kind.layers
            said = [f"{role}, layer {n}: {x:.4f}{'' if h is None else f' ± {h:.4f}'} (n = {mean.n})"
                    for n, (x, h) in enumerate(zip(mean.mean, half, strict=True))]  # fmt: skip
            lines.append(line(number, role, layers, list(mean.mean), half, said))
            rows += [[role, n, x, h, mean.n] for n, (x, h) in enumerate(zip(mean.mean, half, strict=True))]
        row = KINDS[kind.kind]
        what = f"{kind.window} {row.label} layers" if row.windowed else f"one {row.label}"
        title = f"{what}: {kind.cases} prompts, {kind.skipped} not known"
        columns = ["token role", "layer", "AIE", "± 95 %", "n"]
        layout = {"xaxis": {"title": {"text": "layer"}}, "yaxis": {"title": {"text": "average indirect effect"}}}
        charts.append(Chart(title, lines, layout, [Table(f"Average indirect effect: {what}", columns, rows)]))
    return Page("Average indirect effects", effects.summary(), charts, switch="What is restored")


def report_page(report: Report, records: Iterable[Mapping[str, Any]] = ()) -> Page:
    """Shares before and after, a line a record, and each record's prompts with the probabilities of both targets.

    records: what was asked, for the words of the prompts; by their case_id.
    """
    from ..evaluation.report import COLUMNS

    sides = report.rows()
    columns = [name for name in COLUMNS if any(name in row for row in sides.values())]
    means = [[name, *(row[c].mean if c in row else None for c in columns)] for name, row in sides.items()]
    own = [name for name in columns if name != "S"]
    head = ["prompt", "case", "side", "new target", "true target", *own]
    number = {case["case_id"]: n for n, case in enumerate(report.cases)}
    tidy = report.to_rows()
    lines = [
        [row["prompt"], row["case_id"], row["when"], row["target_new"], row["target_true"], *(row.get(c) for c in own)]
        for row in tidy
    ]
    words = {record["case_id"]: record for record in records}
    opened = [
        Record(f"Case {case['case_id']}: {_asked(case)}", _prompts(case, words.get(case["case_id"], {})))
        for case in report.cases
    ]
    table = Table("Records", head, lines, [number[row["case_id"]] for row in tidy])
    return Page(
        "Evaluation",
        f"{len(report.cases)} records, {len(report.skipped)} left out. Shares and differences are times 100.",
        _shares(report, columns),
        [Table("Means over the records", ["model", *columns], means), table],
        opened,
    )


def _shares(report: Report, columns: Sequence[str]) -> list[Chart]:
    """A bar a column and side, with 95 % intervals."""
    shares = [name for name in columns if not name.startswith(NO_SHARES)]
    groups = []
    for number, (name, row) in enumerate(report.rows().items()):
        means = [row.get(column) for column in shares]
        half = [None if m is None or m.stderr is None else NORMAL * m.stderr for m in means]
        said = ["" if m is None else f"{name}, {column}: {m.mean:.1f}{'' if h is None else f' ± {h:.1f}'} (n = {m.n})"
                for column, m, h in zip(shares, means, half, strict=True)]  # fmt: skip
        groups.append(bars(number, name, shares, [None if m is None else m.mean for m in means], half, said))
    layout = {"yaxis": {"title": {"text": "%"}, "range": [0, 102]}, "barmode": "group"}
    return [Chart("Shares", groups, layout)] if shares else []


def _asked(case: Mapping[str, Any]) -> str:
    texts = asked_texts(case)
    return f"{texts['prompt']} → {texts['target_new']}"


def _prompts(case: Mapping[str, Any], record: Mapping[str, Any]) -> list[Table]:
    """What each answer has behind every prompt whose negative log-likelihoods were measured, before and after."""
    sides = [when for when in ("pre", "post") if when in case]
    keys = dict.fromkeys(
        key
        for when in sides
        for key, values in case[when].items()
        if key.endswith("_probs") and values and isinstance(values[0], dict)
    )
    asked = {name for when in sides for key in keys for each in case[when].get(key, ()) for name in each}
    answers = {name: label for name, label in ANSWERS.items() if name in asked}
    rows = []
    for key in keys:
        sort = key.removesuffix("_probs").removesuffix("_prompts")
        measured = [case[when].get(key, ()) for when in sides]
        texts = _texts(case, record, key.removesuffix("_probs"))
        for n in range(max(map(len, measured))):
            chances = [
                math.exp(-values[n][name]) if n < len(values) and name in values[n] else None
                for values in measured
                for name in answers
            ]
            rows.append([texts[n] if n < len(texts) else f"{sort} {n}", sort, *chances])
    names = {"pre": "before", "post": "after"}
    head = ["prompt", "sort", *(f"p({label}) {names[when]}" for when in sides for label in answers.values())]
    return [Table("Probability of an answer's tokens (geometric mean)", head, rows)] if rows else []


def _texts(case: Mapping[str, Any], record: Mapping[str, Any], key: str) -> list[str]:
    """The prompts of a sort in words, where they are known."""
    if key == "rewrite_prompts":
        return [rewrite["prompt"].replace("{}", rewrite["subject"]) for rewrite in rewrites_of(case)]
    prompts = record.get(key, ())
    return [each if isinstance(each, str) else str(each.get("prompt", "")) for each in prompts]


def _plain(values: np.ndarray) -> list[list[float | None]]:
    return [[float(x) if math.isfinite(x) else None for x in row] for row in values]
