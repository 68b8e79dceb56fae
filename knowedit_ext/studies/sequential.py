"""Sequential edits: batch after batch on one model. What is left of the first ones, and of all else?"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..checks import Count, Natural, Seed, typed
from ..datasets import DATASETS
from ..datasets.records import Record, Records
from ..editing.edit import Edit, originals
from ..evaluation.evaluate import evaluate, load, usable
from ..evaluation.metrics import asking
from ..model.identity import identity
from ..model.load import EditableModel
from ..model.weights import find_weight
from ..moments import Moments
from ..runs.files import load_json, write_json
from ..runs.settings import marked
from .ability import Tasks
from .cells import Cell, run_cells
from .perplexity import predicted, text_perplexity
from .results import Sequential
from .stack import Broken, Stack, breaking, check_moments, described
from .treatment import treatments


@dataclass(frozen=True)
class Plan:
    """What all cells share. text: for the perplexity, tasks: of lm-eval; None: left out."""

    edits: int
    batch: int
    every: int
    first: int
    untouched: int
    neighbours: int | None
    text: Sequence[str] | None
    tasks: Tasks | None


@typed
def sequential(
    model: EditableModel,
    records: str | Path | Sequence[Mapping[str, Any]],
    methods: Sequence[str],
    out: str | Path,
    *,
    params: Any = None,
    params_of: Mapping[str, Any] | None = None,
    moments: Moments | None = None,
    edits: Count | None = None,
    batch: Count = 10,
    every: Count = 1,
    seeds: Sequence[Seed] = (0,),
    first: Count = 50,
    untouched: Natural = 100,
    untouched_records: Any = None,
    neighbours: Count | None = None,
    text: Sequence[str] | None = None,
    tasks: Sequence[str] = (),
    tasks_folder: str | Path | None = None,
    tasks_limit: Count | None = None,
    progress: bool = False,
) -> Sequential:
    """Edit facts in batches, one on top of the other, and look every few batches at what there is.

    records: CounterFact (also the flat schema). A seed shuffles them: the first `edits` (None: all, less `untouched`)
        are edited, the next `untouched` of them are not, unless `untouched_records` gives others. Every method meets
        the same facts in the same order.
    methods: "memit", "memit+history" (each batch with `earlier=` those before it), "memit+history:mu=1,layers=5-9"; see
        `Treatment.of`. Methods of a single fact edit those of a batch one after the other. params: of all of them, a
        preset's name; params_of: {method: parameters}, as `ke.edit` takes them.
    every: batches from one look to the next (there is one after the last batch too). A look: rewrite, paraphrase and
        neighbourhood scores of all edits so far and of the `first` ones; of untouched facts the share that is said,
        and preferred to another object; perplexity of `text`; |W - W0| / |W0| of each edited weight; `tasks` of lm-eval
        (as `ability` takes them, of each the first `tasks_limit` questions). neighbours: of each record's neighbourhood
        at most so many are asked.
    out: folder; a study that was killed at any moment goes on at its batch, to the same numbers. The same call in
        several processes shares the methods and seeds among them; more of these may be asked for later. The batches'
        edits stay there (`Edit.load`). `study.json`, `.csv`, `.md` and `.png` are of all that this call asked for.

    A sequence that breaks (numbers that are not finite, a system that cannot be solved) ends there, and the result says
    so. The sum of all edits is added to the first weights, in float64, and rounded once. The model is left as it was.
    Raises ValueError for records, methods or settings that cannot do, before anything is computed.
    """
    chosen = treatments(methods, params, params_of)
    asked = Tasks.of(tasks, tasks_folder, limit=tasks_limit)
    whole = _counterfact(records, neighbours)
    edits = edits or len(whole) - (untouched if untouched_records is None else 0)
    others = None if untouched_records is None else _counterfact(untouched_records, neighbours)
    _check_counts(len(whole), edits, batch, untouched, others)
    check_moments(model, chosen, moments)
    usable(model, whole, asking(DATASETS["counterfact"].ask), False)
    if others is not None:
        usable(model, others, asking(DATASETS["counterfact"].ask), False)
    if text is not None:
        predicted(model, text)
    plan = Plan(edits, batch, every, first, untouched, neighbours, text, asked)
    study = {
        "run": "sequential",
        "model": identity(model),
        "records": marked(json.dumps(whole, sort_keys=True)),
        "untouched_records": None if others is None else marked(json.dumps(others, sort_keys=True)),
        **{key: getattr(plan, key) for key in ("edits", "batch", "every", "first", "untouched")},
        "text": None if text is None else marked(*text),
    }
    if asked is not None:
        study["tasks"] = {"names": list(asked.names), "limit": asked.limit, "files": asked.files()}
    by_label = {treatment.label: treatment for treatment in chosen}
    settings = {label: described(treatment, moments) for label, treatment in by_label.items()}
    cells = [Cell({"method": label, "n": edits, "seed": seed}, settings[label]) for seed in seeds for label in by_label]
    bar = tqdm(total=len(cells) * edits, desc="editing", unit="edit", disable=not progress)

    def compute(cell: Cell, folder: Path) -> dict[str, Any]:
        seed = cell.key["seed"]
        stack = Stack(model, by_label[cell.key["method"]], moments, seed)
        return _Sequence(stack, plan, _facts(whole, others, plan, seed), folder, bar).run()

    def finish(results: Sequence[tuple[Cell, dict[str, Any]]]) -> None:
        Sequential.of(results, study).save(out)

    with bar:
        return Sequential.of(run_cells(out, study, cells, compute, finish), study)


class _Sequence:
    """One method, one seed."""

    def __init__(
        self,
        stack: Stack,
        plan: Plan,
        facts: tuple[Records, Records],
        folder: Path,
        bar: tqdm,
    ) -> None:
        self.stack, self.plan, self.folder, self.bar = stack, plan, folder, bar
        self.edited, self.untouched = facts

    def run(self) -> dict[str, Any]:
        """{"looks": [...], "ended": None or {"edits", "why"}}"""
        looks, ended = [], None
        batches = [self.edited[n : n + self.plan.batch] for n in range(0, len(self.edited), self.plan.batch)]
        try:
            looks.append(self._look(0))
            count = 0
            for number, batch in enumerate(batches, 1):
                try:
                    self.stack.add(batch, self.folder / f"edit_{number:05d}.safetensors")
                    count += len(batch)
                    if number % self.plan.every == 0 or number == len(batches):
                        looks.append(self._look(count))
                except Broken as error:
                    if number == 1:
                        raise error.__cause__ from None
                    ended = {"edits": count, "why": str(error)}
                    break
                self.bar.update(len(batch))
        finally:
            self.stack.place(None)
        return {"looks": looks, "ended": ended}

    def _look(self, count: int) -> dict[str, Any]:
        path = self.folder / f"look_{count:06d}.json"
        if path.exists():
            return load_json(path, sealed=True)
        with breaking():
            look = self._measured(count)
        write_json(path, look, sealed=True)
        return look

    def _measured(self, count: int) -> dict[str, Any]:
        model = self.stack.model
        self.stack.place(self.stack.now)
        ask = partial(evaluate, model, dataset="counterfact", generation=False)
        there = self.edited[: max(count, self.plan.first)] if count == 0 else self.edited[:count]
        report = ask(Records(there))
        look: dict[str, Any] = {"edits": count, "all": _means(report.summary("pre"))}
        report.cases = report.cases[: self.plan.first]
        look["first"] = _means(report.summary("pre"))
        if self.untouched:
            look["untouched"] = _means(ask(self.untouched).summary("pre"))
        if self.plan.text is not None:
            look["perplexity"] = text_perplexity(model, self.plan.text)
        if self.plan.tasks is not None:
            look["tasks"] = self.plan.tasks.scores(model)
        return look | {"growth": _growth(model, self.stack.now)}


def _means(summary: Mapping[str, Any]) -> dict[str, float]:
    return {column: mean.mean for column, mean in summary.items()}


@torch.no_grad()
def _growth(model: EditableModel, edit: Edit | None) -> dict[str, float]:
    """{weight: |W - W0| / |W0|}, Frobenius."""
    before, growth = originals(model), {}
    for name in () if edit is None else edit.changes:
        parameter = find_weight(model.hf, name).parameter
        if parameter is not None:  # quantised: the change stands beside it
            first = before[name].double()
            growth[name] = float((parameter.double() - first).norm() / first.norm())
    return growth


def _counterfact(records: Any, neighbours: int | None) -> Records:
    whole, kind = load(records, None, skip_bad=False, limit=None)
    if kind != "counterfact":
        raise ValueError(f"the records are of {kind}: a study of sequential edits takes CounterFact's")
    return Records(
        {
            "case_id": number,  # of several files there may be two of one number
            "requested_rewrite": record["requested_rewrite"],
            "paraphrase_prompts": record.get("paraphrase_prompts", []),
            "neighborhood_prompts": record.get("neighborhood_prompts", [])[:neighbours],
        }
        for number, record in enumerate(whole)
    )


def _check_counts(whole: int, edits: int, batch: int, untouched: int, others: Records | None) -> None:
    needed = edits + (untouched if others is None else 0)
    if edits < 1 or needed > whole:
        raise ValueError(
            f"{edits} edits and {untouched} untouched facts asked for, but there are {whole} records: ask for fewer, "
            "or give untouched_records"
        )
    if others is not None and len(others) < untouched:
        raise ValueError(f"{untouched} untouched facts asked for, but there are {len(others)} untouched records")
    if batch > edits:
        raise ValueError(f"batch is {batch}: there are {edits} edits in all")


def _facts(whole: Records, others: Records | None, plan: Plan, seed: int) -> tuple[Records, Records]:
    """Those that are edited, in their order, and those that are not, whose new target is the true one."""
    order = random.Random(seed).sample(list(whole), len(whole))
    left = order[plan.edits :] if others is None else random.Random(seed).sample(list(others), len(others))
    return Records(order[: plan.edits]), Records(map(_true, left[: plan.untouched]))


def _true(record: Record) -> Record:
    """The rewrite alone, with the truth as what is to be said: its scores tell whether it still is."""
    rewrite = record["requested_rewrite"]
    swapped = rewrite | {"target_new": rewrite["target_true"], "target_true": rewrite["target_new"]}
    return {"case_id": record["case_id"], "requested_rewrite": swapped}
