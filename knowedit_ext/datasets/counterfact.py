"""CounterFact: the published schema (also of multi_counterfact) and EasyEdit's flat one, told apart by record; and what
is asked about a record (eval_utils_counterfact.py:124-183)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from ..checks import quoted
from ..model.load import EditableModel
from ..model.spelling import spaced
from .dataset import Dataset
from .questions import EXTRAS, Asked, Question, Scores, filled
from .records import (
    REWRITE,
    Problem,
    Record,
    Records,
    Source,
    check_pairs,
    check_rewrite,
    check_text,
    collect_records,
    mark_subject,
    take_case_id,
    take_space,
    take_text,
    take_texts,
)

FLAT = ("prompt", "subject", "target_new", "ground_truth")
FLAT_LISTS = {"rephrase_prompt": "paraphrase_prompts", "locality_prompt": "neighborhood_prompts"}  # of one, or none
LISTS = ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts")
# The target that counts as correct behind each sort of prompt.
CORRECT = {
    "rewrite_prompts": "target_new",
    "paraphrase_prompts": "target_new",
    "neighborhood_prompts": "target_true",
    "attribute_prompts": "target_new",
}
TARGETS = ("target_new", "target_true")


def load_counterfact(
    source: Source, *, skip_bad: bool = False, limit: int | None = None, equal_targets: bool = False
) -> Records:
    """Records in CounterFact's schema from a file (JSON, or JSON lines), or from records in memory.

    source: {case_id, requested_rewrite {prompt with one "{}", subject, relation_id, target_new {str, id}, target_true
        {str, id}}, paraphrase_prompts, neighborhood_prompts, attribute_prompts, generation_prompts, ...}. case_id is a
        number or text. The relation, the ids and the lists may be absent, lists may be empty: what they are for is not
        measured of that record, and a report says of how many. Other keys are kept as they are. EasyEdit's flat records
        {case_id, prompt, subject, target_new, ground_truth, rephrase_prompt, locality_prompt, locality_ground_truth}
        (the last three may be absent) are turned into this schema; see below. `space` (in requested_rewrite) says
        whether a space stands before the targets, where that is not as the prompts' writing has it.
    skip_bad: leave bad records out (`.bad` of the result lists them) where otherwise a ValueError names them.
    limit: look at the first `limit` records of the source only.
    equal_targets: the new target may be the true one, which is to become less likely, or more (see `as_problem`).

    A flat record has at most one paraphrase and one neighbour, no ids, no generation prompts. Two cautions about its
    scores:
    - `rephrase_prompt` is in EasyEdit's files usually (five in six) one of CounterFact's *generation* prompts ("Where
      Danielle Darrieux is from, people speak the language of"): PS asks for a consequence, not for the same statement.
    - NS asks, as always, whether the neighbour prefers target_true to target_new. Where `locality_ground_truth` (kept
      in the record) differs from `ground_truth`, that says only that the new target did not spread, not that the
      neighbour's own answer is kept. In EasyEdit's files the two are the same.

    Raises ValueError for records that lack a key, have a value of the wrong type, a prompt without exactly one "{}", an
    empty subject, target or prompt, equal targets, or the case_id of an earlier record.
    """
    return collect_records(source, partial(_convert, equal_targets=equal_targets), skip_bad=skip_bad, limit=limit)


def _convert(_: int, record: Mapping[str, Any], equal_targets: bool) -> Record:
    take_case_id(record)
    if "requested_rewrite" not in record and any(key in record for key in FLAT):
        return _from_flat(record, equal_targets)
    _check_rewrite(record, equal_targets)
    for key in LISTS:
        take_texts(record, key, least=0)
    for key in EXTRAS:
        check_pairs(record, key)
    return dict(record)


def _check_rewrite(record: Mapping[str, Any], equal_targets: bool) -> None:
    new, true = check_rewrite(record, TARGETS)
    rewrite = record["requested_rewrite"]
    _check_id(rewrite, "relation_id", REWRITE)
    for key in TARGETS:
        _check_id(rewrite[key], "id", f"{REWRITE}{key}.")
    if not equal_targets:
        _check_targets(new, true, f"{REWRITE}target_new.str")


def _check_id(record: Mapping[str, Any], key: str, inside: str) -> None:
    if record.get(key) is not None:
        check_text(record[key], inside + key)


def _check_targets(new: str, true: str, key: str) -> None:
    if new.strip() == true.strip():
        raise Problem(key, f"is {quoted(new)}, the true target: nothing to edit")


def _from_flat(record: Mapping[str, Any], equal_targets: bool) -> Record:
    text = {key: take_text(record, key) for key in FLAT}
    if not equal_targets:
        _check_targets(text["target_new"], text["ground_truth"], "target_new")
    if "locality_ground_truth" in record:
        take_text(record, "locality_ground_truth")
    lists = {name: [take_text(record, key)] if record.get(key) is not None else [] for key, name in FLAT_LISTS.items()}
    return {
        **{key: value for key, value in record.items() if key not in (*FLAT, *FLAT_LISTS, "space")},
        "requested_rewrite": {
            "prompt": mark_subject(text["prompt"], text["subject"], "prompt"),
            "relation_id": None,
            "target_new": {"str": text["target_new"], "id": None},
            "target_true": {"str": text["ground_truth"], "id": None},
            "subject": text["subject"],
            **take_space(record),
        },
        **lists,
        "attribute_prompts": [],
        "generation_prompts": [],
    }


def need_prompts(records: Iterable[Record], *sorts: str) -> None:
    """ValueError that names a record without prompts of these sorts, which a record may lack but what comes cannot."""
    for record in records:
        if lacking := [sort for sort in sorts if not record.get(sort)]:
            raise ValueError(f"record with case_id {record['case_id']} has no {' and no '.join(lacking)}: needed here")


def ask(
    model: EditableModel, record: Mapping[str, Any], edit: int, attributes: bool = False, compat: str | None = None
) -> Asked:
    """Questions, and what turns their scores into a case's "pre" or "post".

    Both targets are asked behind every prompt: {sort}_probs holds their NLLs, {sort}_correct whether all tokens of the
    right one are the likeliest. attributes: ask also about other subjects that have the new object.
    """
    rewrite = record["requested_rewrite"]
    prompts = {"rewrite_prompts": [filled(rewrite)]}
    for sort in ("paraphrase_prompts", "neighborhood_prompts", *(("attribute_prompts",) if attributes else ())):
        prompts[sort] = list(record.get(sort, ()))
    space = rewrite.get("space")  # as the edit was asked for

    def question(text: str) -> Question:
        return Question(text, tuple(spaced(rewrite[name]["str"], text, space) for name in TARGETS), edit)

    questions = [question(text) for texts in prompts.values() for text in texts]

    def read(scores: Scores, before: Scores | None = None) -> dict[str, Any]:
        left = iter(scores)
        measures: dict[str, Any] = {}
        for sort, texts in prompts.items():
            here = [dict(zip(TARGETS, next(left), strict=True)) for _ in texts]
            measures[f"{sort}_probs"] = [{name: x[name].nll for name in TARGETS} for x in here]
            measures[f"{sort}_correct"] = [x[CORRECT[sort]].correct for x in here]
        return measures

    return questions, read


def _detect(record: Mapping[str, Any]) -> bool:
    return "requested_rewrite" in record or any(key in record for key in FLAT)


DATASET = Dataset("counterfact", _detect, load_counterfact, ask, generates=True)
