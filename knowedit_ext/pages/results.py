"""What stands on the pages of a trace, of a data set's effects, and of an evaluation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..datasets.questions import asked_texts
from ..plots import OKABE_ITO
from .page import Chart, Page, Record, Table

if TYPE_CHECKING:
    from ..evaluation.report import Report
    from ..tracing.effects import Effects
    from ..tracing.trace import Trace

LEAST = 1e-6  # of a scale


def trace_page(trace: Trace) -> Page:
    """The map of scores; a click on a cell shows its noise samples."""
    from ..tracing.kinds import KINDS

    kind, errors = KINDS[trace.kind], trace.standard_error
    tokens = [f"{n} {token}" for n, token in enumerate(trace.tokens)]
    layers = [f"layer {n}" for n in range(trace.scores.shape[1])]
    reach = max(LEAST, float(np.nanmax(np.abs(trace.indirect_effect))))
    heat = {
        "type": "heatmap",
        "z": _plain(trace.scores),
        "x": layers,
        "y": tokens,
        "customdata": [[_cell(trace, n, layer, errors) for layer in range(len(layers))] for n in range(len(tokens))],
        "hovertemplate": "%{customdata}<extra></extra>",
        "colorscale": kind.colours,
        "zmin": trace.low_score - reach,
        "zmax": trace.low_score + reach,
    }
    prompt = "".join(trace.tokens)
    lead = (
        f"The answer{trace.answer!r} has {trace.high_score:.3f} in the clean run and {trace.low_score:.3f} with the "
        f"subject corrupted. Each cell: its score when the clean {kind.label} is restored there"
        f"{f', in {trace.window} layers around it' if kind.windowed else ''}."
    )
    title = f"{prompt} →{trace.answer} ({kind.label})"
    layout = {"yaxis": {"autorange": "reversed", "automargin": True}, "xaxis": {"automargin": True}}
    rows = [[token, *row] for token, row in zip(tokens, _plain(trace.scores), strict=True)]
    chart = Chart("Scores by token and layer", [heat], layout)
    return Page(title, lead, [chart], [Table("Scores", ["token", *layers], rows)])


def _cell(trace: Trace, n: int, layer: int, errors: np.ndarray) -> str:
    score = f"{trace.tokens[n]!r}, layer {layer}: {trace.scores[n, layer]:.4f}"
    if math.isfinite(errors[n, layer]):
        score += f" ± {errors[n, layer]:.4f} (standard error)"
    samples = [f"{x:.3f}" for x in trace.sample_scores[:, n, layer]] if len(trace.sample_scores) else []
    return score + (f"; noise samples {', '.join(samples)}" if samples else "")


def effects_page(effects: Effects) -> Page:
    """By kind the average indirect effect of each token role over the layers, with 95 % intervals."""
    charts = []
    for name, kind in effects.kinds.items():
        traces = []
        for colour, (role, mean) in zip(OKABE_ITO * 2, kind.aie.items(), strict=False):
            half = mean.half_width or [None] * kind.layers
            said = [f"{role}, layer {n}: {x:.4f}{'' if h is None else f' ± {h:.4f}'} (n = {mean.n})"
                    for n, (x, h) in enumerate(zip(mean.mean, half, strict=True))]  # fmt: skip
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": role,
                    "x": list(range(kind.layers)),
                    "y": list(mean.mean),
                    "error_y": {"type": "data", "array": half, "thickness": 1},
                    "line": {"color": colour if colour != "#000000" else "#CC79A7"},  # seen on dark paper, too
                    "customdata": said,
                    "hovertemplate": "%{customdata}<extra></extra>",
                }
            )
        layout = {"xaxis": {"title": {"text": "layer"}}, "yaxis": {"title": {"text": "average indirect effect"}}}
        charts.append(Chart(f"{name}: {kind.cases} prompts, {kind.skipped} not known", traces, layout))
    columns = ["token role", "kind", "layer", "AIE", "± 95 %", "n"]
    rows = [[r["role"], r["kind"], r["layer"], r["aie"], r["half_width"], r["n"]] for r in effects.rows()]
    return Page("Average indirect effects", effects.summary(), charts, [Table("All values", columns, rows)])


def report_page(report: Report) -> Page:
    """Summaries, a line a record, and each record's prompts with the probabilities of both targets."""
    from ..evaluation.report import COLUMNS

    sides = report.rows()
    columns = [name for name in COLUMNS if any(name in row for row in sides.values())]
    means = [[name, *(row[c].mean if c in row else None for c in columns)] for name, row in sides.items()]
    tidy = report.to_rows()
    own = [name for name in columns if any(name in row for row in tidy)]
    head = ["prompt", "case", "side", "new target", "true target", *own]
    lines = [
        [row["prompt"], row["case_id"], row["when"], row["target_new"], row["target_true"], *(row.get(c) for c in own)]
        for row in tidy
    ]
    records = [Record(f"Case {case['case_id']}: {_asked(case)}", _prompts(case)) for case in report.cases]
    return Page(
        "Evaluation",
        f"{len(report.cases)} records, {len(report.skipped)} left out. Shares and differences are times 100.",
        tables=[Table("Means over the records", ["model", *columns], means), Table("Records", head, lines)],
        records=records,
    )


def _asked(case: dict[str, Any]) -> str:
    texts = asked_texts(case)
    return f"{texts['prompt']} → {texts['target_new']}"


def _prompts(case: dict[str, Any]) -> list[Table]:
    """Of each side: p(new) and p(true) behind every prompt whose negative log-likelihoods were measured."""
    tables = []
    for when in ("pre", "post"):
        rows = []
        for key, values in case.get(when, {}).items():
            if key.endswith("_probs") and values and isinstance(values[0], dict):
                for n, nll in enumerate(values):
                    chances = [math.exp(-nll[name]) if name in nll else None for name in ("target_new", "target_true")]
                    rows.append([f"{key.removesuffix('_prompts_probs').removesuffix('_probs')} {n}", *chances])
        if rows:
            tables.append(Table({"pre": "Before", "post": "After"}[when], ["prompt", "p(new)", "p(true)"], rows))
    return tables


def _plain(values: np.ndarray) -> list[list[float | None]]:
    return [[float(x) if math.isfinite(x) else None for x in row] for row in values]
