"""MQuAKE (Zhong et al. 2023): facts that are edited together, and questions several hops away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .answers import dataset, load_answers
from .records import Record, Records, Source, take_objects, take_text, take_texts

REWRITE = ("prompt", "subject", "relation_id", "target_new", "target_true", "space")


def load_mquake(source: Source, *, skip_bad: bool = False, limit: int | None = None) -> Records:
    """MQuAKE-CF, -CF-3k and -T in the layout of `datasets.answers`.

    source: {case_id, requested_rewrite [{prompt with one "{}", subject, target_new {str}, target_true {str}}, ...],
        questions, answer, answer_alias, new_answer, new_answer_alias, single_hops, new_single_hops [{question, cloze,
        answer, answer_alias}, ...]}; the aliases, the old answer and the hops may be absent. case_id is the index,
        where they have none.

    Tests: "multi_hop", any of the questions is given the new answer, as published; "multi_hop_old", the answer that was
    right before; "hops", each fact of the new chain is known (by its cloze, or its question where it has none). The
    questions stand alone, where the published evaluation puts examples in front of them.

    Raises ValueError for records that lack a key, have a value of another type or an empty one, or ask two targets of
    one prompt.
    """
    return load_answers(source, NAME, _convert, skip_bad, limit)


def _convert(record: Mapping[str, Any]) -> Record:
    rewrites = [
        {k: v for k, v in one.items() if k in REWRITE} for one in take_objects(record, "requested_rewrite", least=1)
    ]
    questions = take_texts(record, "questions")
    tests = {"multi_hop": [_any(questions, *_answer(record, "new_answer"))]}
    if record.get("answer") is not None:
        tests["multi_hop_old"] = [_any(questions, *_answer(record, "answer"))]
    if hops := take_objects(record, "new_single_hops"):
        tests["hops"] = [{"queries": [_hop(hop, f"new_single_hops[{n}].") for n, hop in enumerate(hops)]}]
    return {"requested_rewrite": rewrites, "tests": tests}


def _answer(record: Mapping[str, Any], key: str, inside: str = "") -> tuple[str, list[str]]:
    return take_text(record, key, inside), take_texts(record, f"{key}_alias", inside, least=0)


def _any(questions: list[str], answer: str, aliases: list[str]) -> Record:
    return {"queries": [{"prompt": q, "target": answer, "aliases": aliases} for q in questions], "any": True}


def _hop(hop: Mapping[str, Any], inside: str) -> Record:
    answer, aliases = _answer(hop, "answer", inside)
    prompt = take_text(hop, "cloze" if hop.get("cloze") is not None else "question", inside)
    return {"prompt": prompt, "target": answer, "aliases": aliases}


def _published(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("requested_rewrite"), list) and "dataset" not in record


NAME = "mquake"
DATASET = dataset(NAME, _published, load_mquake)
