"""Tests of what follows from an edit: multi-hop questions (MQuAKE) and ripple effects (RippleEdits).

A test has queries {prompt, target, aliases}; a query is answered where the target, or any of its aliases, is the greedy
continuation of the prompt. A test passes where all of its queries are answered, or (`any`) at least one. It counts only
where the unedited model answers all of its `conditions`, and, of a record that `needs_edit`, where the edit took: the
edited model answers its prompt with the new target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...datasets.questions import Asked, Question, Score, Scores, filled, rewrites_of, spellings
from ..metric import Metric, shares

COLUMNS = {
    "multi_hop": "multi-hop",
    "multi_hop_old": "old answer",
    "hops": "all hops",
    "Logical_Generalization": "rip. LG",
    "Compositionality_I": "rip. CI",
    "Compositionality_II": "rip. CII",
    "Subject_Aliasing": "rip. SA",
    "Forgetfulness": "rip. PV",
    "Relation_Specificity": "rip. RS",
}


def _answered(answers: Sequence[Score]) -> bool:
    return any(answer.correct for answer in answers)


def _ask(record: Mapping[str, Any], edit: int) -> Asked:
    space = rewrites_of(record)[0].get("space")
    tests = [(name, test) for name, every in record.get("tests", {}).items() for test in every]
    edited = [
        {"prompt": filled(x), "target": x["target_new"]["str"], "aliases": x["target_new"].get("aliases", ())}
        for x in (rewrites_of(record) if record.get("needs_edit") else ())
    ]
    queries = [*edited, *(query for _, test in tests for query in (*test.get("conditions", ()), *test["queries"]))]
    questions = [Question(x["prompt"], spellings(x, x["prompt"], space), edit) for x in queries]

    def read(scores: Scores, before: Scores | None = None) -> dict[str, Any]:
        now: Iterator[bool] = map(_answered, scores)
        then: Iterator[bool] = map(_answered, scores if before is None else before)
        took = all([next(now) for _ in edited]) or before is None  # an unedited model is measured as it is
        for _ in edited:
            next(then)
        measured: dict[str, Any] = {}
        for name, test in tests:
            known = [(next(now), next(then))[1] for _ in test.get("conditions", ())]
            right = [(next(now), next(then))[0] for _ in test["queries"]]
            here = measured.setdefault(f"{name}_correct", [])
            if took and all(known):
                here.append(any(right) if test.get("any") else all(right))
        return measured

    return questions, read


METRIC = Metric(tuple(COLUMNS.values()), 150, shares(COLUMNS), _ask)
