"""ROME at every layer and token (Meng et al. 2022, figure 5): where does an edit work?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import Count, Natural, Seed, typed
from ..datasets.records import Record, Records
from ..editing.params import LayerParams
from ..editing.request import EditRequest
from ..editing.tokenized import reaches_end
from ..evaluation.evaluate import evaluate
from ..evaluation.methods import Editing
from ..evaluation.scores import values_of
from ..model.facts import tokenize_fact
from ..model.hooks import at_rest
from ..model.identity import identity
from ..model.load import EditableModel
from ..moments import Moments
from ..plots import figure_of
from ..runs.settings import marked
from .cells import Cell, Results, run_cells
from .edit_sets import UNEDITED, Measuring, counterfact
from .findings import Findings, means_of
from .plots import legend, line_of_rows, named
from .stack import check_moments, described
from .treatment import Treatment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS = ("subject_first", "subject_last", "subject_first_after_last", "last")
PANELS = ("S", "EM", "PM", "NM", "RS", "GE")


@at_rest
@typed
def layer_token(
    model: EditableModel,
    records: Any,
    out: str | Path,
    *,
    params: Any,
    method: str = "rome",
    moments: Moments | None = None,
    layers: Sequence[Natural] | None = None,
    tokens: Sequence[str] = TOKENS,
    facts: Count = 100,
    seed: Seed = 0,
    generation: bool = False,
    snippets: Mapping[str, Any] | None = None,
    skip_bad: bool = False,
    progress: bool = False,
) -> Findings:
    """Edit each of the first `facts` records by itself at every layer and token, and score it.

    method: of single facts, as in `sequential`; params: a preset's name, or its own. moments: of every layer. tokens:
    some of `TOKENS`, whose key is changed. layers: None: all.

    Where an edit can change nothing (the last layer, unless the token ends the prompt) its fact counts as it is without
    one; facts in which nothing follows the subject have no subject_first_after_last and are left out there: see
    "facts" and "null" of the rows, which have means by layer and token; "unedited": the model as it is.
    """
    treatment = Treatment.of(method, params, {})
    if treatment.method.each is None or not hasattr(treatment.params, "fact_token"):
        raise ValueError(f"{treatment.method.name} does not edit single facts at a token: expected rome or r_rome")
    for name in tokens:
        if name not in TOKENS:
            raise ValueError(f"unknown token '{name}': expected some of {', '.join(TOKENS)}")
    layers = list(range(model.num_layers)) if layers is None else list(layers)
    check_moments(model, [replace(treatment, params=replace(treatment.params, layers=tuple(layers)))], moments)
    texts = Measuring(generation, snippets)
    some = counterfact(model, records, skip_bad, texts)[:facts]
    study = {"run": "layer_token", "model": identity(model), **texts.describe(model)}
    told = {"records": marked(json.dumps(some, sort_keys=True))}
    measuring = dict(generation=generation, snippets=snippets, dataset="counterfact")
    cells, chosen = [Cell({"method": UNEDITED, "n": len(some)}, told)], {}
    for token in tokens:
        for layer in layers:
            at = replace(treatment.params, layers=(layer,), fact_token=token)
            key = {"method": treatment.label, "token": token, "layer": layer, "n": len(some), "seed": seed}
            cells.append(Cell(key, {**told, **described(replace(treatment, params=at), moments)}))
            chosen[cells[-1].name] = at

    def compute(cell: Cell, folder: Path) -> dict[str, Any]:
        if cell.name not in chosen:
            report = evaluate(model, Records(some), None, out=folder / "evaluation", **measuring)
            return {"cases": [values_of(case["pre"]) for case in report.cases]}
        at = chosen[cell.name]
        places = [_place(model, record, at) for record in some]
        alive = [record for record, place in zip(some, places, strict=True) if place == "edited"]
        cases: list[dict[str, float]] = []
        if alive:
            editing = Editing(model, treatment.method.name, at, moments, False, seed)
            report = evaluate(model, Records(alive), editing, baseline=False, out=folder / "evaluation", **measuring)
            cases = [values_of(case["post"]) for case in report.cases]
        return {"cases": cases, "null": [n for n, place in enumerate(places) if place == "null"]}

    find = partial(_findings, settings={**study, "facts": len(some), "layers": layers, "seed": seed})
    finish = lambda results: find(results).save(out)  # noqa: E731
    return find(run_cells(out, study, cells, compute, finish, progress="layer_token" if progress else None))


def _place(model: EditableModel, record: Record, params: LayerParams) -> str:
    """ "edited", "null": an edit there changes nothing, or "absent": its prompt has no such token."""
    request = EditRequest.of(record)
    tokenized = tokenize_fact(model, request.fact())
    if params.fact_token == "subject_first_after_last" and tokenized.subject_range[1] >= len(tokenized.ids):
        return "absent"
    return "edited" if reaches_end(model, request, params.layers[-1], params.fact_token) else "null"


def _findings(results: Results, settings: dict[str, Any]) -> Findings:
    rows: list[dict[str, Any]] = []
    before = next((result["cases"] for cell, result in results if cell.key["method"] == UNEDITED), None)
    for cell, result in results:
        null = [] if before is None else [before[n] for n in result.get("null", ())]
        if cases := [*result["cases"], *null]:
            keys = {name: value for name, value in cell.key.items() if name != "n"}
            rows.append({**keys, "facts": len(cases), "null": len(null), **means_of(cases)})
    return Findings(rows, settings, ("method", "token", "layer", "seed"), {"layer_token": curves})


def curves(study: Findings) -> Figure:
    """A panel a score, a line a token over the layers with 95 % bands; dotted: unedited."""
    panels = [name for name in PANELS if any(name in row for row in study.rows)]
    figure = figure_of(2.7 * len(panels), 2.7)
    for axes, score in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, token in enumerate(study.names("token")):
            line_of_rows(axes, study.chosen(token=token), "layer", score, number, token.replace("_", " "))
        for row in study.chosen(method=UNEDITED):
            axes.axhline(row[score], color="0.4", linestyle=":", linewidth=1, label=UNEDITED)
        named(axes, "layer", None, score)
    legend(figure)
    return figure
