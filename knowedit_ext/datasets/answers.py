"""Data sets of questions with answers of their own, a file each: the layout that their records are loaded into, its
check, and what is asked.

{dataset, case_id, requested_rewrite (one, or a list that belongs together; target_true may be absent, target_new may
have "aliases"), paraphrase_prompts, neighborhood_prompts [{prompt, target, aliases}], more such lists under the names
of `questions.EXTRAS`, tests {name: [{queries, any, conditions}]}, needs_edit}, of which all but the first three may be
absent. Tests are what `metrics.tests` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from reprlib import repr as brief
from typing import Any

from ..model.load import EditableModel
from .dataset import Dataset
from .questions import EXTRAS, Asked, Question, Scores, filled, rewrites_of, spellings
from .records import (
    Problem,
    Record,
    Records,
    Source,
    check_one_rewrite,
    check_pairs,
    collect_records,
    take,
    take_case_id,
    take_objects,
    take_texts,
)

Convert = Callable[[Mapping[str, Any]], Record]  # a published record -> what it asks, less case_id and dataset


def load_answers(source: Source, name: str, convert: Convert, skip_bad: bool, limit: int | None) -> Records:
    """Records of the data set `name`; those that were loaded before are checked again."""

    def load(index: int, record: Mapping[str, Any]) -> Record:
        if record.get("dataset") == name:
            loaded = dict(record)
        else:
            case_id = take_case_id(record) if "case_id" in record else index
            loaded = {"dataset": name, "case_id": case_id, **convert(record)}
        _check(loaded)
        return loaded

    return collect_records(source, load, skip_bad=skip_bad, limit=limit)


def dataset(
    name: str, published: Callable[[Mapping[str, Any]], bool], load: Callable[..., Records], baseline: bool = False
) -> Dataset:
    """published: is a record one of this data set's, as it was published? baseline: see `Dataset`."""
    return Dataset(
        name, lambda record: record.get("dataset") == name or published(record), load, ask, baseline=baseline
    )


def _check(record: Mapping[str, Any]) -> None:
    take_case_id(record)
    rewrites, wanted = take(record, "requested_rewrite"), {}
    if isinstance(rewrites, list) and not rewrites:
        raise Problem("requested_rewrite", "is an empty list")
    for number, rewrite in enumerate(rewrites if isinstance(rewrites, list) else [rewrites]):
        name = f"requested_rewrite[{number}]" if isinstance(rewrites, list) else "requested_rewrite"
        true = ("target_true",) if isinstance(rewrite, Mapping) and "target_true" in rewrite else ()
        new, *_ = check_one_rewrite(rewrite, ("target_new", *true), name)
        take_texts(rewrite["target_new"], "aliases", f"{name}.target_new.", least=0)
        if wanted.setdefault((rewrite["prompt"], rewrite["subject"]), new) != new:
            raise Problem(f"{name}.target_new.str", "contradicts another target for the same prompt and subject")
    take_texts(record, "paraphrase_prompts", least=0)
    for key in ("neighborhood_prompts", *EXTRAS):
        check_pairs(record, key)
    tests = record.get("tests", {})
    if not isinstance(tests, Mapping) or not all(isinstance(name, str) for name in tests):
        raise Problem("tests", f"is {brief(tests)}, expected an object")
    for name in tests:
        for number, test in enumerate(take_objects(tests, name, "tests.")):
            inside = f"tests.{name}[{number}]."
            check_pairs(test, "queries", inside, least=1)
            check_pairs(test, "conditions", inside)


def ask(
    model: EditableModel, record: Mapping[str, Any], edit: int, attributes: bool = False, compat: str | None = None
) -> Asked:
    """{sort}_probs, NLLs of the new target and, where it is known, of the true one; {sort}_correct, of the answer's
    tokens how many are the likeliest (of its alias of which most are). `attributes`, `compat`: nothing differs."""
    asked: list[tuple[str, bool, Question]] = []  # sort, whether the second target is the true one, question
    rewrites = rewrites_of(record)
    prompts = [("rewrite_prompts", filled(rewrite), rewrite) for rewrite in rewrites]
    prompts += [("paraphrase_prompts", text, rewrites[0]) for text in record.get("paraphrase_prompts", ())]
    for sort, prompt, rewrite in prompts:
        space, new = rewrite.get("space"), rewrite["target_new"]
        targets = spellings({"target": new["str"], "aliases": new.get("aliases", ())}, prompt, space)
        true = spellings({"target": rewrite["target_true"]["str"]}, prompt, space) if "target_true" in rewrite else ()
        asked.append((sort, bool(true), Question(prompt, targets[:1] + true + targets[1:], edit)))
    for pair in record.get("neighborhood_prompts", ()):
        targets = spellings(pair, pair["prompt"], rewrites[0].get("space"))
        asked.append(("neighborhood_prompts", False, Question(pair["prompt"], targets, edit)))

    def read(scores: Scores, before: Scores | None = None) -> dict[str, Any]:
        measured: dict[str, Any] = {}
        for (sort, has_true, _), answers in zip(asked, scores, strict=True):
            if sort != "neighborhood_prompts":
                true = {"target_true": answers[1].nll} if has_true else {}
                measured.setdefault(f"{sort}_probs", []).append({"target_new": answers[0].nll, **true})
            right = [answer.share for n, answer in enumerate(answers) if not (has_true and n == 1)]
            measured.setdefault(f"{sort}_correct", []).append(max(right))
        return measured

    return [question for *_, question in asked], read
