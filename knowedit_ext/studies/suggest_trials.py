"""Candidates of `suggest`, edited and evaluated on parts of the records: the cells of its folder.

Values, which take most of an edit's time, are computed once for all candidates that share them, and once a record.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..datasets.records import Record, Records
from ..editing.kept_values import KeptValues
from ..editing.params import LayerParams
from ..evaluation.evaluate import evaluate
from ..evaluation.methods import Editing
from ..evaluation.scores import summary_of, values_of
from ..model.identity import checksum, identity
from ..model.load import EditableModel
from ..moments import Moments
from ..runs.files import read_tensors, write_tensors
from ..runs.settings import marked
from .cells import Cell, run_cells
from .stack import Broken, breaking
from .suggest_space import Group, Space

SCORES = ("ES", "PS", "NS")
SEARCHED, HELD_OUT = "searched", "held_out"
VALUES = "values"
Work = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class Trial:
    """What a candidate came to on the first records of a half. cases: their columns, see `evaluation.scores`; none
    where it could not be edited, `ended` says why. seconds: that edits, values left out, and evaluation took."""

    params: LayerParams
    records: int
    cases: tuple[Mapping[str, float], ...]
    seconds: float
    ended: str | None

    @cached_property
    def means(self) -> dict[str, float]:
        return {name: mean.mean for name, mean in summary_of(list(self.cases)).items()}

    @property
    def rank(self) -> tuple[float, float]:
        """S, and between equals the mean of the magnitudes EM, PM and NM."""
        if self.ended is not None:
            return (-1.0, 0.0)
        return (self.means["S"], sum(self.means[name] for name in ("EM", "PM", "NM")) / 3)


class Trials:
    """model, method, moments, and the records' two halves, all of which the folder's settings name.

    together: one edit of all records; else one of each.
    """

    def __init__(
        self,
        model: EditableModel,
        out: Path,
        space: Space,
        moments: Moments | None,
        records: Records,
        *,
        held_out: float,
        together: bool,
        seed: int,
        progress: bool,
    ) -> None:
        self.model, self.out, self.space, self.moments = model, out, space, moments
        self.method, self.together, self.seed, self.progress = space.method, together, seed, progress
        order = random.Random(seed).sample(list(records), len(records))
        held = round(held_out * len(order))
        self.halves = {SEARCHED: order[: len(order) - held], HELD_OUT: order[len(order) - held :]}
        for name, half in self.halves.items():
            if not half:
                raise ValueError(f"{len(order)} records leave none that are {name.replace('_', ' ')}: give more")
        self.study = {
            "run": "suggest",
            "model": identity(model),
            "method": self.method.name,
            "together": together,
            "seed": seed,
            **{name: marked(json.dumps(half, sort_keys=True)) for name, half in self.halves.items()},
        }
        self._took: dict[str, float] = {}
        self._contexts: dict[Any, Any] = {}
        self._sums: dict[int, list[Any]] = {}

    def run(self, jobs: Sequence[tuple[Cell, Work]], what: str) -> list[dict[str, Any]]:
        by_name = {cell.name: work for cell, work in jobs}
        compute = lambda cell, folder: by_name[cell.name](folder)  # noqa: E731
        cells, bar = [cell for cell, _ in jobs], what if self.progress else None
        results = run_cells(self.out, self.study, cells, compute, needed=True, progress=bar)
        self._took |= {cell.name: result["seconds"] for cell, result in results}
        return [result for _, result in results]

    @property
    def seconds(self) -> float:
        """That all that was asked for took, when it was computed."""
        return sum(self._took.values())

    def measure(self, groups: Sequence[Group], half: str, parts: Sequence[range], what: str) -> list[list[Trial]]:
        """Each candidate of each group on the records of a half that `parts`, one behind the other, cover."""
        shared = list(dict.fromkeys(self.space.shared(group.candidates[0]) for group in groups))
        sharing = self.method.keeps_values(self.space.base)
        values = [self._values_cell(one, half, part) for one in shared for part in parts] if sharing else []
        broken = {
            cell.name: result["ended"]
            for (cell, _), result in zip(values, self.run(values, f"{what}: values"), strict=True)
        }
        asked = [range(parts[-1].stop)] if self.together else parts
        candidates = [one for group in groups for one in group.candidates]
        cells = [self._cell(params, half, part, parts, broken) for params in candidates for part in asked]
        results = iter(self.run(cells, what))
        found = {params: self._trial(params, [next(results) for _ in asked]) for params in candidates}
        return [[found[params] for params in group.candidates] for group in groups]

    def _trial(self, params: LayerParams, results: Sequence[Mapping[str, Any]]) -> Trial:
        cases = tuple(case for result in results for case in result["cases"])
        ended = next((result["ended"] for result in results if result["ended"]), None)
        trial = Trial(params, len(cases), () if ended else cases, sum(result["seconds"] for result in results), ended)
        if ended is None and not set(SCORES) <= set(trial.means):
            raise ValueError("the records lack paraphrases or neighbours: S, which tells candidates apart, needs both")
        return trial

    def _cell(
        self, params: LayerParams, half: str, part: range, parts: Sequence[range], broken: Mapping[str, str | None]
    ) -> tuple[Cell, Work]:
        key = {"half": half, "records": f"{part.start}-{part.stop}", **_key(params)}
        covered = [one for one in parts if one.start >= part.start and one.stop <= part.stop]
        values = self._values_cells(params, half, covered)
        ended = next((broken[cell.name] for cell in values if broken[cell.name]), None)

        def work(_: Path) -> dict[str, Any]:
            if ended is not None:
                return {"cases": [], "seconds": 0.0, "ended": ended}
            began = perf_counter()
            try:
                with breaking():
                    cases = self._measure(params, self.halves[half][part.start : part.stop], self._read(values))
            except Broken as error:
                return {"cases": [], "seconds": perf_counter() - began, "ended": str(error)}
            return {"cases": cases, "seconds": perf_counter() - began, "ended": None}

        return Cell(key, {"params": params.to_dict(), "moments": self._moments(params)}), work

    def _measure(
        self, params: LayerParams, records: Sequence[Record], values: torch.Tensor | None
    ) -> list[dict[str, float]]:
        """An edit of the records, or one of each, and what they say under it."""
        options = dict(moments=self.moments, together=self.together, seed=self.seed)
        kept = None if values is None else KeptValues.of(records, values)
        editing = Editing(
            self.model, self.method.name, params, **options, contexts=self._contexts_of(params), values=kept
        )
        edits = editing(records) if self.together else editing
        report = evaluate(self.model, Records(records), edits, False, False, dataset="counterfact")
        return [values_of(case["post"]) for case in report.cases]

    def _values_cells(self, params: LayerParams, half: str, parts: Sequence[range]) -> list[Cell]:
        if not self.method.keeps_values(params):
            return []
        return [self._values_cell(self.space.shared(params), half, part)[0] for part in parts]

    def _values_cell(self, params: LayerParams, half: str, part: range) -> tuple[Cell, Work]:
        key = {"part": VALUES, "half": half, "records": f"{part.start}-{part.stop}", **_key(params)}

        def work(folder: Path) -> dict[str, Any]:
            began, records = perf_counter(), self.halves[half][part.start : part.stop]
            contexts = self._contexts_of(params)
            try:
                with breaking():
                    values = self.method.values(self.model, records, params, contexts=contexts)
            except Broken as error:
                return {"seconds": perf_counter() - began, "ended": str(error)}
            write_tensors(folder / "values.safetensors", {VALUES: values}, {})
            return {"seconds": perf_counter() - began, "ended": None}

        return Cell(key, {"params": params.to_dict()}), work

    def _read(self, cells: Sequence[Cell]) -> torch.Tensor | None:
        files = [self.out / "cells" / cell.name / "values.safetensors" for cell in cells]
        return torch.cat([read_tensors(file)[0][VALUES] for file in files]) if files else None

    def _contexts_of(self, params: LayerParams) -> Any:
        if self.method.contexts is None:
            return None
        asked = getattr(params, "context_template_length_params", None)
        if asked not in self._contexts:
            self._contexts[asked] = self.method.contexts(self.model, params, self.seed)
        return self._contexts[asked]

    def _moments(self, params: LayerParams) -> dict[str, Any]:
        used = params.layers if self.method.uses_moments(params) else ()
        for layer in used:
            if layer not in self._sums:
                self._sums[layer] = [self.moments[layer].count, checksum(self.moments[layer].matrix())]
        return {str(layer): self._sums[layer] for layer in used}


def _key(params: LayerParams) -> dict[str, str]:
    """Layers for people, and all there is."""
    digest = marked(json.dumps(params.to_dict(), sort_keys=True))
    return {"layers": "+".join(map(str, params.layers)), "params": digest[-12:]}
