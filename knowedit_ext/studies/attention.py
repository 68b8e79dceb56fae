"""What an edit does to attention: each head's look from the last token at the subject, before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import Count, Seed, typed
from ..editing.request import EditRequest
from ..evaluation.methods import Editing
from ..model.hooks import at_rest
from ..model.identity import identity
from ..model.load import EditableModel
from ..moments import Moments
from ..plots import figure_of
from ..runs.settings import marked
from ..tracing.heads import MEASURES, head_attention
from ..tracing.interval import Interval
from .cells import Cell, Results, run_cells
from .edit_sets import counterfact
from .findings import HALF, Findings
from .plots import heat_map, named
from .stack import check_moments, described
from .treatment import treatments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUP = 16  # facts computed together
TITLES = {"attention": "attention to the subject", "value_norm": "|attention x value x W_O|"}


@at_rest
@typed
def attention(
    model: EditableModel,
    records: Any,
    methods: Sequence[str],
    out: str | Path,
    *,
    params: Any = None,
    params_of: Mapping[str, Any] | None = None,
    moments: Moments | None = None,
    facts: Count = 50,
    seed: Seed = 0,
    skip_bad: bool = False,
    progress: bool = False,
) -> Findings:
    """Edit each of the first `facts` records by itself, and look at its prompt before and after (`head_attention`).

    methods, params, params_of, moments, out: as in `scaling`. Rows: method, layer, head, and of attention and
    value_norm the means over facts before and after the edit, and of the change with the half width of its 95 %
    interval.
    """
    chosen = {treatment.label: treatment for treatment in treatments(methods, params, params_of)}
    check_moments(model, list(chosen.values()), moments)
    some = counterfact(model, records, skip_bad)[:facts]
    groups = [some[n : n + GROUP] for n in range(0, len(some), GROUP)]
    study = {"run": "attention", "model": identity(model)}
    cells, work = [], {}
    for group in groups:
        told = {"records": marked(json.dumps(group, sort_keys=True))}
        for label, treatment in chosen.items():
            key = {"method": label, "first": group[0]["case_id"], "facts": len(group), "seed": seed}
            cells.append(Cell(key, {**told, **described(treatment, moments)}))
            work[cells[-1].name] = (treatment, group)

    def compute(cell: Cell, _: Path) -> dict[str, Any]:
        treatment, group = work[cell.name]
        prompts = [EditRequest.of(record).fact(target=False) for record in group]
        editing = Editing(model, treatment.method.name, treatment.params, moments, False, seed)
        after = []
        for fact, edit in zip(prompts, editing(group), strict=True):
            with edit.applied(model):
                after.append(head_attention(model, [fact])[0])
        return {"before": head_attention(model, prompts).tolist(), "after": np.stack(after).tolist()}

    find = partial(_findings, settings={**study, "facts": len(some), "seed": seed})
    finish = lambda results: find(results).save(out)  # noqa: E731
    return find(run_cells(out, study, cells, compute, finish, progress="attention" if progress else None))


def _findings(results: Results, settings: dict[str, Any]) -> Findings:
    rows = []
    for method in dict.fromkeys(cell.key["method"] for cell, _ in results):
        parts = [result for cell, result in results if cell.key["method"] == method]
        before, after = (np.concatenate([np.array(part[when]) for part in parts]) for when in ("before", "after"))
        changes = Interval.of((after - before).astype(np.float64))
        means, change, half = before.mean(0), np.array(changes.mean), changes.half_width
        for layer, head in np.ndindex(before.shape[2:]):
            row: dict[str, Any] = {"method": method, "layer": layer, "head": head, "facts": len(before)}
            for n, name in enumerate(MEASURES):
                at = (n, layer, head)
                row[f"{name}_before"] = float(means[at])
                row[f"{name}_after"] = float(means[at] + change[at])
                row[f"{name}_change"] = float(change[at])
                row[f"{name}_change{HALF}"] = None if half is None else float(np.array(half)[at])
            rows.append(row)
    return Findings(rows, settings, ("method",), {"heads": heads})


def heads(study: Findings) -> Figure:
    """Layers x heads: the unedited model, and what each method's edits change, of attention and of what is taken."""
    methods = study.names("method")
    figure = figure_of(2.5 * (len(methods) + 1), 2.4 * len(MEASURES))
    panels = figure.subplots(len(MEASURES), len(methods) + 1, squeeze=False)
    layers, count = len(study.names("layer")), len(study.names("head"))
    for row, name in zip(panels, MEASURES, strict=True):
        shown = [("before", methods[0], "unedited")] + [("change", method, f"change by {method}") for method in methods]
        reach = max(abs(line[f"{name}_change"]) for line in study.rows) or 1e-6  # one scale for all methods
        for axes, (when, method, title) in zip(row, shown, strict=True):
            values = [line[f"{name}_{when}"] for line in study.chosen(method=method)]
            heat_map(figure, axes, np.array(values).reshape(layers, count), reach if when == "change" else None)
            named(axes, "head", "layer", f"{TITLES[name]}\n{title}")
    return figure
