"""Facts of two relations edited together (Meng et al. 2023, figure 7): is a mix harder than each alone?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import Count, Seed, typed
from ..datasets.records import Record
from ..datasets.relations import NAMES
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..moments import Moments
from ..plots import figure_of
from .categories import of_relations
from .edit_sets import EditSet, Measured, Measuring, broken, counterfact, measure_sets
from .findings import HALF, Findings, means_of
from .plots import legend, line_of_rows, log_scale, named
from .relations import TYPES
from .treatment import treatments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CASES = ("subjects and objects alike", "subjects alike", "objects alike", "nothing alike")
COUNTS = (2, 4, 10, 20, 40, 100, 200, 400, 700)
MIX, AVERAGE = "mix", "average"
By = Mapping[str, Sequence[Record]]


@at_rest
@typed
def mixes(
    model: EditableModel,
    records: Any,
    methods: Sequence[str],
    out: str | Path,
    *,
    params: Any = None,
    params_of: Mapping[str, Any] | None = None,
    moments: Moments | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    counts: Sequence[Count] | None = None,
    seeds: Sequence[Seed] = (0,),
    skip_bad: bool = False,
    progress: bool = False,
) -> Findings:
    """Edit n facts, half of each of two relations, against n of each alone and the mean of the two.

    pairs: of relation_ids; None: the largest pair of each of the four cases: subjects and objects are of one type,
    subjects are, objects are, neither (as far as the records have them). counts: the n, even numbers; None: up to 700,
    as far as the smaller relation goes. Rows: method, case, pair, set ("mix", a relation, "average"), n, seed, means.
    """
    chosen = treatments(methods, params, params_of)
    by_relation = of_relations(counterfact(model, records, skip_bad))
    taken = _largest_pairs(by_relation) if pairs is None else [tuple(pair) for pair in pairs]
    if not taken:
        raise ValueError("the records have no two relations with facts of their own: there is nothing to mix")
    sets: list[EditSet] = []
    for pair in taken:
        for name in pair:
            if name not in by_relation:
                raise ValueError(f"no record is of relation '{name}': there are {', '.join(sorted(by_relation))}")
        if pair[0] == pair[1]:
            raise ValueError(f"a pair is {'+'.join(pair)}: expected two relations")
        most = min(len(by_relation[name]) for name in pair)
        grid = [n for n in COUNTS if n <= most] if counts is None else list(counts)
        if bad := [n for n in grid if n % 2 or n > most]:
            raise ValueError(f"{bad[0]} facts of {'+'.join(pair)}: expected an even number up to {most}")
        for n in grid:
            facts = {MIX: [*by_relation[pair[0]][: n // 2], *by_relation[pair[1]][: n // 2]]}
            facts |= {name: by_relation[name][:n] for name in pair}
            for name, some in facts.items():
                key = {"pair": "+".join(pair), "set": name, "n": n}
                sets += [EditSet(key, treatment, some, seed) for seed in seeds for treatment in chosen]
    study = {"run": "mixes"}
    find = partial(_findings, settings={**study, "pairs": ["+".join(pair) for pair in taken], "seeds": list(seeds)})
    return measure_sets(model, out, study, sets, moments, Measuring(), find, progress)


def case_of(first: str, second: str) -> str | None:
    """Which of the four cases a pair is; None where one of them is of no known types."""
    if first not in TYPES or second not in TYPES:
        return None
    (a, x), (b, y) = TYPES[first], TYPES[second]
    return CASES[2 * (a != b) + (x != y)]


def _largest_pairs(by_relation: By) -> list[tuple[str, str]]:
    best: dict[str, tuple[int, tuple[str, str]]] = {}
    for pair in combinations(sorted(by_relation), 2):
        case, size = case_of(*pair), min(len(by_relation[name]) for name in pair)
        if case is not None and size > best.get(case, (1,))[0]:
            best[case] = (size, pair)
    return [best[case][1] for case in CASES if case in best]


def _findings(measured: Sequence[Measured], settings: dict[str, Any]) -> Findings:
    rows: list[dict[str, Any]] = []
    for one in measured:
        if one.cases:
            pair = one.of.key["pair"]
            case = case_of(*pair.split("+")) or ""
            rows.append(
                {"method": one.of.method, "case": case, **one.of.key, "seed": one.of.seed, **means_of(one.cases)}
            )
    singles: dict[tuple[str, str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["set"] != MIX:
            singles.setdefault((row["method"], row["pair"], row["n"], row["seed"]), []).append(row)
    for both in singles.values():
        if len(both) == 2:
            shared = [name for name in both[0] if name in both[1] and isinstance(both[0][name], float)]
            means = {name: (both[0][name] + both[1][name]) / 2 for name in shared if not name.endswith(HALF)}
            keys = {name: both[0][name] for name in ("method", "case", "pair", "n", "seed")}
            rows.append({**keys, "set": AVERAGE, **means})
    return Findings(rows, settings, ("method", "case", "pair", "set"), {"mixes": curves}, broken(measured))


def curves(study: Findings) -> Figure:
    """A panel a pair: score S of the mix, of each relation alone and their mean, over n (first method and seed)."""
    pairs = study.names("pair")
    figure = figure_of(2.6 * len(pairs) + 0.5, 2.7)
    panels = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    for axes, pair in zip(panels, pairs, strict=True):
        first, second = pair.split("+")
        rows = study.chosen(pair=pair, method=study.rows[0]["method"], seed=study.rows[0]["seed"])
        labels = {MIX: MIX, first: "first alone", second: "second alone", AVERAGE: AVERAGE}
        for number, (name, label) in enumerate(labels.items()):
            line_of_rows(axes, [row for row in rows if row["set"] == name], "n", "S", number, label)
        log_scale(axes.xaxis, sorted({row["n"] for row in rows}))
        named(axes, "edits", None, f"{NAMES.get(first, first)} +\n{NAMES.get(second, second)}\n({rows[0]['case']})")
    named(panels[0], y="score S")
    legend(figure)
    return figure
