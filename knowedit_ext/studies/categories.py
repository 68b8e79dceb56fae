"""Facts of one relation edited together (Meng et al. 2023, figure 6): which categories are easy to change?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import Count, Seed, typed
from ..datasets.records import Record, Records
from ..datasets.relations import NAMES, relation_name
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..moments import Moments
from ..plots import figure_of
from .edit_sets import UNEDITED, EditSet, Measured, Measuring, broken, counterfact, measure_sets
from .findings import Findings, means_of
from .plots import grouped_bars, legend, look, name_points, named
from .treatment import treatments

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@at_rest
@typed
def categories(
    model: EditableModel,
    records: Any,
    methods: Sequence[str],
    out: str | Path,
    *,
    params: Any = None,
    params_of: Mapping[str, Any] | None = None,
    moments: Moments | None = None,
    edits: Count = 300,
    relations: Sequence[str] | None = None,
    seeds: Sequence[Seed] = (0,),
    skip_bad: bool = False,
    progress: bool = False,
) -> Findings:
    """Edit the first `edits` facts of each relation that has as many, and score them.

    relations: some relation_ids; None: all that are large enough. The rest is as in `scaling`. Rows: method, relation,
    n, seed and means; "unedited": the model as it is.
    """
    chosen = treatments(methods, params, params_of)
    by_relation = of_relations(counterfact(model, records, skip_bad))
    wanted = [name for name, facts in by_relation.items() if len(facts) >= edits] if relations is None else relations
    for name in wanted:
        if len(by_relation.get(name, ())) < edits:
            raise ValueError(f"relation '{name}' has {len(by_relation.get(name, ()))} records, fewer than {edits}")
    if not by_relation:
        raise ValueError("no record has a relation_id: there are no categories to edit")
    if not wanted:
        most = max(map(len, by_relation.values()))
        raise ValueError(f"no relation has {edits} records, the largest {most}: ask for fewer edits")
    sets = [
        EditSet({"relation": name, "n": edits}, treatment, by_relation[name][:edits], seed)
        for name in sorted(wanted)
        for treatment in (None, *chosen)
        for seed in (seeds if treatment is not None else seeds[:1])
    ]
    study = {"run": "categories"}
    find = partial(_findings, settings={**study, "edits": edits, "relations": sorted(wanted), "seeds": list(seeds)})
    return measure_sets(model, out, study, sets, moments, Measuring(), find, progress)


def of_relations(records: Records) -> dict[str, list[Record]]:
    """By relation_id; records without one are left out."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if name := record["requested_rewrite"].get("relation_id"):
            groups[name].append(record)
    return dict(groups)


def _findings(measured: Sequence[Measured], settings: dict[str, Any]) -> Findings:
    rows = [
        {"method": one.of.method, **one.of.key, "seed": one.of.seed, **means_of(one.cases)}
        for one in measured
        if one.cases
    ]
    figures = {"by_relation": by_relation_bars, "specificity": specificity}
    return Findings(rows, settings, ("method", "relation"), figures, broken(measured))


def _methods(study: Findings) -> list[str]:
    return [name for name in study.names("method") if name != UNEDITED]


def by_relation_bars(study: Findings) -> Figure:
    """Score S by relation, a bar a method (the left panel): the first seed."""
    relations = study.names("relation")
    figure = figure_of(max(4.0, 0.5 * len(relations) * max(1, len(_methods(study))) * 0.6 + 1.5), 2.8)
    axes = figure.add_subplot()
    series = {}
    for method in _methods(study):
        rows = [(study.chosen(method=method, relation=name) or [{}])[0] for name in relations]
        series[method] = [(row.get("S", 0.0), row.get("S_half") or 0.0) for row in rows]
    grouped_bars(axes, [relation_name(name) for name in relations], series)
    named(axes, None, "score S", f"{study.settings['edits']} facts of one relation")
    legend(figure)
    return figure


def specificity(study: Findings) -> Figure:
    """Specificity against generalisation, a point a relation and method (the right panel)."""
    figure = figure_of(3.6, 3.2)
    axes = figure.add_subplot()
    points = []
    for number, method in enumerate(_methods(study)):
        rows = [row for row in study.chosen(method=method) if "PS" in row and "NS" in row]
        style = {name: value for name, value in look(number).items() if name != "linestyle"}
        axes.scatter([row["PS"] for row in rows], [row["NS"] for row in rows], s=24, alpha=0.7, label=method, **style)
        points += [(row["PS"], row["NS"], NAMES.get(row["relation"], row["relation"])) for row in rows]
    name_points(axes, points)
    named(axes, "generalisation PS, %", "specificity NS, %")
    legend(figure)
    return figure
