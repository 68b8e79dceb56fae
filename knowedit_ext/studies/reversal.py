"""Is an edit known the other way round? "Microsoft was founded by" edited, "The founder of Microsoft is" asked.

Edits are made from the subject to the object; whether the object leads back to the subject, nobody taught it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import Count, Seed, typed
from ..datasets.questions import Question, Score
from ..datasets.records import Record
from ..editing.edit import Edit
from ..evaluation.edited import Edited
from ..evaluation.methods import Editing
from ..evaluation.nll import score
from ..model.hooks import at_rest
from ..model.identity import identity
from ..model.load import EditableModel
from ..model.spelling import spaced
from ..moments import Moments
from ..plots import figure_of
from ..runs.settings import marked
from .cells import Cell, Results, run_cells
from .edit_sets import UNEDITED, counterfact
from .findings import HALF, NORMAL, Findings
from .plots import grouped_bars, legend, named
from .relations import INVERSE
from .stack import check_moments, described
from .treatment import treatments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUP = 8  # facts computed together
# column -> what it is
COLUMNS = {
    "forward": "paraphrases that prefer the new object, %",
    "inverse": "inverse prompts that prefer the subject to each true one, %",
    "probability": "p(subject) behind an inverse prompt",
    "rank": "of the subject among the candidates, 1 the likeliest",
    "logprob": "mean log-probability of a token of the subject",
}


@dataclass(frozen=True)
class Item:
    """A record, its inverse prompts, and the names that are scored behind them: the subject's, then others of the
    relation. right: which of these others truly have the new object."""

    record: Record
    prompts: tuple[str, ...]
    candidates: tuple[str, ...]
    right: tuple[bool, ...]


@at_rest
@typed
def reversal(
    model: EditableModel,
    records: Any,
    methods: Sequence[str],
    out: str | Path,
    *,
    params: Any = None,
    params_of: Mapping[str, Any] | None = None,
    moments: Moments | None = None,
    facts: Count = 100,
    candidates: Count = 50,
    seed: Seed = 0,
    skip_bad: bool = False,
    progress: bool = False,
) -> Findings:
    """Edit each of the first `facts` records that can be turned round by itself, and ask it both ways.

    records: CounterFact; the inverse prompts are a record's `reversal_prompts`, or those of its relation in
        `studies.relations.INVERSE`. candidates: subjects of the relation, the record's own among them, taken in the
        records' order, those that truly have the new object first.
    methods, params, params_of, moments, out: as in `scaling`.

    Rows: method ("unedited": as it is), and the means over facts of `COLUMNS` with the half width of their 95 %
    interval. "forward" is the control: the same edits asked by their paraphrases.
    """
    chosen = {treatment.label: treatment for treatment in treatments(methods, params, params_of)}
    check_moments(model, list(chosen.values()), moments)
    items = _items(counterfact(model, records, skip_bad), facts, candidates)
    study = {"run": "reversal", "model": identity(model)}
    cells, work = [], {}
    for group in (items[n : n + GROUP] for n in range(0, len(items), GROUP)):
        told = {"items": marked(*(json.dumps([i.record, i.prompts, i.candidates, i.right]) for i in group))}
        key = {"first": group[0].record["case_id"], "facts": len(group)}
        for label in (UNEDITED, *chosen):
            extra = {} if label == UNEDITED else described(chosen[label], moments)
            seeded = {} if label == UNEDITED else {"seed": seed}
            cells.append(Cell({"method": label, **key, **seeded}, {**told, **extra}))
            work[cells[-1].name] = group

    def compute(cell: Cell, _: Path) -> dict[str, Any]:
        group, label = work[cell.name], cell.key["method"]
        if label == UNEDITED:
            return {"facts": _ask(model, group, None)}
        treatment = chosen[label]
        editing = Editing(model, treatment.method.name, treatment.params, moments, False, seed)
        edits = editing([item.record for item in group])
        if isinstance(edits, Sequence) and _together(model, edits):
            return {"facts": _ask(model, group, Edited(model, edits))}
        pairs = zip(group, edits, strict=True)
        return {"facts": [_ask(model, [item], Edited(model, edit))[0] for item, edit in pairs]}

    find = partial(_findings, settings={**study, "facts": len(items), "candidates": candidates, "seed": seed})
    finish = lambda results: find(results).save(out)  # noqa: E731
    return find(run_cells(out, study, cells, compute, finish, progress="reversal" if progress else None))


def _items(records: Sequence[Record], facts: int, candidates: int) -> list[Item]:
    subjects: dict[str, dict[str, str]] = defaultdict(dict)  # relation -> subject -> its true object
    for record in records:
        rewrite = record["requested_rewrite"]
        if relation := rewrite.get("relation_id"):
            subjects[relation].setdefault(rewrite["subject"], rewrite["target_true"]["str"].strip())
    items = []
    for record in records:
        rewrite = record["requested_rewrite"]
        relation, new = rewrite.get("relation_id"), rewrite["target_new"]["str"].strip()
        prompts = _prompts(record, relation, new)
        if prompts and record.get("paraphrase_prompts") and len(items) < facts:
            others = {name: obj == new for name, obj in subjects[relation].items() if name != rewrite["subject"]}
            kept = sorted(others, key=lambda name: not others[name])[: candidates - 1]  # stable: true ones first
            items.append(Item(record, prompts, (rewrite["subject"], *kept), tuple(others[name] for name in kept)))
    if not items:
        raise ValueError(
            "no record can be turned round: none has paraphrases and reversal_prompts (or a relation with inverse ones)"
        )
    return items


def _prompts(record: Record, relation: str | None, new: str) -> tuple[str, ...]:
    if record.get("reversal_prompts"):
        return tuple(pair["prompt"] for pair in record["reversal_prompts"]) if relation else ()
    return tuple(prompt.replace("{}", new) for prompt in INVERSE.get(relation or "", ()))


def _together(model: EditableModel, edits: Sequence[Edit]) -> bool:
    try:
        Edited(model, edits)
    except ValueError:  # dense ones go one by one
        return False
    return True


def _ask(model: EditableModel, items: Sequence[Item], edited: Edited | None) -> list[dict[str, float]]:
    questions = []
    for number, item in enumerate(items):
        rewrite = item.record["requested_rewrite"]
        both = [rewrite[name]["str"] for name in ("target_new", "target_true")]
        asked = [(prompt, both) for prompt in item.record["paraphrase_prompts"]]
        asked += [(prompt, item.candidates) for prompt in item.prompts]
        for prompt, targets in asked:
            texts = tuple(spaced(text, prompt, rewrite.get("space")) for text in targets)
            questions.append(Question(prompt, texts, number))
    scores = iter(next(side for side in reversed(score(model, questions, edited, edited is None)) if side is not None))
    found = []
    for item in items:
        forward = [next(scores) for _ in item.record["paraphrase_prompts"]]
        inverse = [next(scores) for _ in item.prompts]
        found.append(_read(item, forward, inverse))
    return found


def _read(item: Item, forward: Sequence[Sequence[Score]], inverse: Sequence[Sequence[Score]]) -> dict[str, float]:
    nll = np.array([[answer.nll for answer in answers] for answers in inverse])  # [prompts, candidates]
    values = {
        "forward": 100 * float(np.mean([new.nll < true.nll for new, true in forward])),
        "probability": float(np.mean([answers[0].probability for answers in inverse])),
        "rank": float(np.mean(1 + (nll[:, 1:] < nll[:, :1]).sum(1))),
        "logprob": float(-nll[:, 0].mean()),
    }
    if any(item.right):
        values["inverse"] = 100 * float(np.mean(nll[:, :1] < nll[:, 1:][:, list(item.right)]))
    return values


def _findings(results: Results, settings: dict[str, Any]) -> Findings:
    rows = []
    for method in dict.fromkeys(cell.key["method"] for cell, _ in results):
        facts = [fact for cell, result in results if cell.key["method"] == method for fact in result["facts"]]
        row: dict[str, Any] = {"method": method, "facts": len(facts)}
        for column in COLUMNS:
            values = [fact[column] for fact in facts if column in fact]
            if values:
                row[column] = float(np.mean(values))
                error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
                row[column + HALF] = None if error is None else float(NORMAL * error)
        rows.append(row)
    notes = [f"{name}: {what}" for name, what in COLUMNS.items()]
    return Findings(rows, settings, ("method",), {"reversal": bars}, notes)


def bars(study: Findings) -> Figure:
    """Forward against inverse success, and the subject's rank, a group a method."""
    figure = figure_of(6.4, 2.8)
    left, right = figure.subplots(1, 2)
    methods = study.names("method")
    rows = [study.chosen(method=method)[0] for method in methods]
    both = {n: [(row.get(n, 0.0), row.get(n + HALF) or 0.0) for row in rows] for n in ("forward", "inverse")}
    grouped_bars(left, methods, both)
    named(left, None, "preferred, %")
    grouped_bars(right, methods, {"rank": [(row["rank"], row["rank" + HALF] or 0.0) for row in rows]}, first=2)
    named(right, None, f"rank of the subject among {study.settings['candidates']}")
    legend(figure)
    return figure
