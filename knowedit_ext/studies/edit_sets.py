"""Sets of facts, each edited into the first model and measured: the cells that most studies are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..datasets import DATASETS
from ..datasets.records import Record, Records
from ..editing.kept_values import KeptValues, check_keeps, keep_values
from ..evaluation.evaluate import evaluate, load, usable
from ..evaluation.metrics import asking
from ..evaluation.scores import values_of
from ..evaluation.texts import Texts
from ..model.identity import identity
from ..model.load import EditableModel
from ..moments import Moments
from ..runs.settings import marked
from .cells import Cell, run_cells
from .findings import Findings
from .stack import Broken, Stack, check_moments, described
from .treatment import Treatment

UNEDITED = "unedited"
BATCH = 50  # facts of a method of single facts, between two savings


@dataclass(frozen=True)
class Measuring:
    """generation, snippets, tfidf: as `evaluate` takes them."""

    generation: bool = False
    snippets: Mapping[str, Any] | None = None
    tfidf: Any = None

    def texts(self, model: EditableModel) -> Texts | None:
        return Texts(model, self.snippets, self.tfidf) if self.generation else None

    def describe(self, model: EditableModel) -> dict[str, Any]:
        texts = self.texts(model)
        compared = None if self.snippets is None else marked(json.dumps(self.snippets, sort_keys=True))
        return {"texts": None if texts is None else texts.describe(), "snippets": compared}


@dataclass(frozen=True)
class EditSet:
    """Facts that are edited together: in one edit, or, by a method of single facts, one on top of the other.

    key: what tells it from the study's others beside its method; treatment: None: the model as it is is measured.
    """

    key: Mapping[str, Any]
    treatment: Treatment | None
    records: Sequence[Record]
    seed: int = 0

    @property
    def method(self) -> str:
        return UNEDITED if self.treatment is None else self.treatment.label


@dataclass(frozen=True)
class Measured:
    """cases: of each fact its columns; none where edits broke or were refused. ended: why, and after how many."""

    of: EditSet
    cases: list[dict[str, float]]
    ended: str | None


def counterfact(model: EditableModel, source: Any, skip_bad: bool, measuring: Measuring | None = None) -> Records:
    """Records that can be edited together, asked about and, where texts are measured, gone on from."""
    records, kind = load(source, None, skip_bad, None)
    if kind != "counterfact":
        raise ValueError(f"the records are of {kind}: a study takes CounterFact's")
    texts = None if measuring is None else measuring.texts(model)
    return usable(model, records, asking(DATASETS[kind].ask), skip_bad, texts=texts, together=True)


def measure_sets(
    model: EditableModel,
    out: str | Path,
    study: Mapping[str, Any],
    sets: Sequence[EditSet],
    moments: Moments | None,
    measuring: Measuring,
    findings: Callable[[list[Measured]], Findings],
    progress: bool,
    store: str | Path | None = None,
) -> Findings:
    """study: settings that all sets share, beside the model and what is measured. findings: of the sets there are; they
    are saved after each. store: of the values of all their facts, see `keep_values`; ValueError where not all have the
    same. A set's edits and cases are kept in its cell (`edit_*.safetensors`, `evaluation/`), from which
    one that was killed goes on.
    """
    check_moments(model, [one.treatment for one in sets if one.treatment is not None], moments)
    if store is not None:
        _check_shared([one for one in sets if one.treatment is not None])
    kept = cache(lambda: None if store is None else _kept(model, sets, store, progress))
    shared = {**study, "model": identity(model), **measuring.describe(model)}
    by_name: dict[str, EditSet] = {}
    cells, told = [], {}
    for one in sets:
        if one.treatment is not None and one.method not in told:
            told[one.method] = dict(described(one.treatment, moments))
        settings = {"records": marked(json.dumps(list(one.records), sort_keys=True)), **told.get(one.method, {})}
        cells.append(Cell({"method": one.method, **one.key, "seed": one.seed}, settings))
        by_name[cells[-1].name] = one

    def compute(cell: Cell, folder: Path) -> dict[str, Any]:
        return _measure(model, by_name[cell.name], moments, measuring, folder, kept)

    def found(results: Sequence[tuple[Cell, Mapping[str, Any]]]) -> Findings:
        return findings([Measured(by_name[cell.name], x["cases"], x["ended"]) for cell, x in results])

    bar = study["run"] if progress else None
    return found(run_cells(out, shared, cells, compute, lambda results: found(results).save(out), progress=bar))


def _measure(
    model: EditableModel,
    one: EditSet,
    moments: Moments | None,
    measuring: Measuring,
    folder: Path,
    kept: Callable[[], KeptValues | None],
) -> dict[str, Any]:
    edit = None
    if one.treatment is not None:
        stack = Stack(model, one.treatment, moments, one.seed, kept())
        size = BATCH if one.treatment.method.single else len(one.records)
        try:
            for first in range(0, len(one.records), size):
                try:
                    stack.add(one.records[first : first + size], folder / f"edit_{first:06d}.safetensors")
                except Broken as error:
                    return {"cases": [], "ended": f"after {first} edits: {error}"}
        finally:
            stack.place(None)
        edit = stack.now
    report = evaluate(
        model,
        Records(one.records),
        edit,
        measuring.generation,
        False,
        dataset="counterfact",
        snippets=measuring.snippets,
        tfidf=measuring.tfidf,
        out=folder / "evaluation",
    )
    return {"cases": [values_of(case["pre" if edit is None else "post"]) for case in report.cases], "ended": None}


def _check_shared(edited: Sequence[EditSet]) -> None:
    """ValueError for sets that cannot have their values from one folder."""
    treated = {one.method: one.treatment for one in edited}
    for label, treatment in treated.items():
        check_keeps(treatment.method, treatment.params)
        if treatment.method.single:
            raise ValueError(f"--store: '{label}' edits one fact on top of the other: their values are not shared")
    kinds = {(t.method.values, json.dumps(t.params.describe_values(), sort_keys=True)) for t in treated.values()}
    if len(kinds) > 1 or len({one.seed for one in edited}) > 1:
        several = "methods whose values differ" if len(kinds) > 1 else "several seeds of contexts"
        raise ValueError(f"--store holds the values of one kind, these are {several}: run them one by one")


def _kept(model: EditableModel, sets: Sequence[EditSet], store: str | Path, progress: bool) -> KeptValues:
    edited = [one for one in sets if one.treatment is not None]
    records = [record for one in edited for record in one.records]
    method, params = edited[0].treatment.method, edited[0].treatment.params
    return keep_values(method, model, records, params, store, seed=edited[0].seed, progress=progress)


def broken(measured: Sequence[Measured]) -> list[str]:
    """Notes of the sets that have no cases."""
    return [f"{one.of.method}, {_spelled(one.of.key)}: ended {one.ended}" for one in measured if one.ended is not None]


def _spelled(key: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in key.items())
