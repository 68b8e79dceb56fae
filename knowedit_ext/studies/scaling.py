"""How methods scale (Meng et al. 2023, figure 5): 1 to 10,000 facts, the scores of all of them."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import Count, Seed, typed
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..moments import Moments
from ..plots import figure_of
from .edit_sets import UNEDITED, EditSet, Measured, Measuring, broken, counterfact, measure_sets
from .findings import Findings, means_of
from .plots import legend, line_of_rows, log_scale, named
from .treatment import Treatment, treatments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID = tuple(round(math.exp(math.log(10_000) * n / 16)) for n in range(17))  # 1, 2, 3, 6, 10, ... 5623, 10000
PANELS = ("S", "ES", "PS", "NS", "GE", "RS")


@at_rest
@typed
def scaling(
    model: EditableModel,
    records: Any,
    methods: Sequence[str],
    out: str | Path,
    *,
    params: Any = None,
    params_of: Mapping[str, Any] | None = None,
    moments: Moments | None = None,
    counts: Sequence[Count] | None = None,
    least: Count = 1,
    seeds: Sequence[Seed] = (0,),
    shuffle: bool = False,
    generation: bool = False,
    snippets: Mapping[str, Any] | None = None,
    tfidf: Any = None,
    skip_bad: bool = False,
    store: str | Path | None = None,
    progress: bool = False,
) -> Findings:
    """Edit the first n facts, for each n, and score them all.

    records: CounterFact, a file or records; where some cannot be edited together `skip_bad` leaves them out.
    methods: as in `sequential`: "memit", "memit:layers=3-5", ...; those of single facts (ROME) edit one on top of the
        other, the others all at once. params: of all of them, a preset's name; params_of: {method: parameters}.
    counts: the n; None: the published grid, 1 to 10,000, as far as there are records.
    least: facts to score for each n: where n is smaller, several batches of n are edited, each on the first model.
    seeds: of generated contexts and of `shuffle`; without it the records' own order is kept, as published.
    generation, snippets, tfidf: as `evaluate` takes them, for GE and RS.
    store: folder of the optimised values of all facts, which are then computed once for every n and every method, and
        for other runs of the same values (docs/folders.md).

    Rows: method, n, seed, facts (those scored) and means with the half width of their 95 % interval over facts; method
    "unedited" is the model as it is, on the largest n's facts. out: see `sequential`.
    """
    chosen = treatments(methods, params, params_of)
    measuring = Measuring(generation, snippets, tfidf)
    whole = counterfact(model, records, skip_bad, measuring)
    grid = sorted(set(counts or [n for n in GRID if n <= len(whole)]))
    if grid[-1] > len(whole):
        raise ValueError(f"{grid[-1]} edits asked for, but there are {len(whole)} records that can be edited together")
    sets = [one for seed in seeds for one in _sets(whole, chosen, grid, least, seed, shuffle)]
    study = {"run": "scaling", "shuffle": shuffle}
    draw = partial(curves, x="n")
    find = partial(_findings, settings={**study, "counts": grid, "least": least, "seeds": list(seeds)}, draw=draw)
    return measure_sets(model, out, study, sets, moments, measuring, find, progress, store)


def _sets(
    whole: Sequence[Any], chosen: Sequence[Treatment], grid: Sequence[int], least: int, seed: int, shuffle: bool
) -> list[EditSet]:
    ordered = random.Random(seed).sample(list(whole), len(whole)) if shuffle else list(whole)
    sets = [EditSet({"n": grid[-1], "part": 0}, None, ordered[: grid[-1]], seed)]
    for n in grid:
        parts = max(1, min(least, len(ordered)) // n)
        for treatment in chosen:
            for part in range(parts):
                facts = ordered[part * n : part * n + n]
                sets.append(EditSet({"n": n, "part": part}, treatment, facts, seed))
    return sets


def _findings(measured: Sequence[Measured], settings: dict[str, Any], draw: Any) -> Findings:
    """Parts of one n together."""
    groups: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    for one in measured:
        groups.setdefault((one.of.method, one.of.key["n"], one.of.seed), []).extend(one.cases)
    rows = [
        {"method": method, "n": n, "seed": seed, "facts": len(cases), **means_of(cases)}
        for (method, n, seed), cases in groups.items()
        if cases
    ]
    return Findings(rows, settings, ("method",), {"curves": draw}, broken(measured))


def curves(study: Findings, x: str) -> Figure:
    """A panel a score, a line a method over log n with its 95 % band (of the first seed); dotted: unedited."""
    panels = [name for name in PANELS if any(name in row for row in study.rows)]
    lines = -(-len(panels) // 3)
    columns = -(-len(panels) // lines)
    figure = figure_of(2.7 * columns, 2.3 * lines + 0.4)
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    methods = [name for name in study.names("method") if name != UNEDITED]
    for axes, score in zip(grid, panels, strict=False):
        for number, method in enumerate(methods):
            rows = study.chosen(method=method)
            line_of_rows(axes, [row for row in rows if row["seed"] == rows[0]["seed"]], x, score, number, method)
        for row in study.chosen(method=UNEDITED)[:1]:
            if score in row:
                axes.axhline(row[score], color="0.4", linestyle=":", linewidth=1, label=UNEDITED)
        log_scale(axes.xaxis, sorted({row[x] for row in study.rows if row["method"] in methods}))
        named(axes, "edits", None, score)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    legend(figure)
    return figure
