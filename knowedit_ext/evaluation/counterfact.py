"""CounterFact: what is asked about a record, and a case in the published layout (eval_utils_counterfact.py:124-183)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..model.load import EditableModel
from ..model.spelling import spaced
from .nll import Question, Score

# The target that counts as correct behind each sort of prompt.
CORRECT = {
    "rewrite_prompts": "target_new",
    "paraphrase_prompts": "target_new",
    "neighborhood_prompts": "target_true",
    "attribute_prompts": "target_new",
}
# Asked beyond the published metrics, where a record has them: prompts with one answer of their own.
EXTRAS = ("same_subject_prompts", "reversal_prompts", "portability_prompts")
TARGETS = ("target_new", "target_true")
Asked = tuple[list[Question], Callable[[Sequence[Sequence[Score]]], dict[str, Any]]]


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
    extra_questions, read_extras = ask_extras(record, edit)

    def read(scores: Sequence[Sequence[Score]]) -> dict[str, Any]:
        left = iter(scores)
        found: dict[str, Any] = {}
        for sort, texts in prompts.items():
            here = [dict(zip(TARGETS, next(left), strict=True)) for _ in texts]
            found[f"{sort}_probs"] = [{name: x[name].nll for name in TARGETS} for x in here]
            found[f"{sort}_correct"] = [x[CORRECT[sort]].correct for x in here]
        return found | read_extras(list(left))

    return questions + extra_questions, read


def ask_extras(record: Mapping[str, Any], edit: int) -> Asked:
    """The extras that a record has; {sort}_correct is the share of the answer's tokens that are the likeliest."""
    asked = [(sort, x) for sort in EXTRAS for x in record.get(sort) or ()]
    space = record["requested_rewrite"].get("space")

    def read(scores: Sequence[Sequence[Score]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for (sort, _), (answer,) in zip(asked, scores, strict=True):
            found.setdefault(f"{sort}_probs", []).append({"target": answer.nll})
            found.setdefault(f"{sort}_correct", []).append(sum(answer.right) / len(answer.right))
        return found

    return [Question(x["prompt"], (spaced(x["target"], x["prompt"], space),), edit) for _, x in asked], read


def filled(rewrite: Mapping[str, Any]) -> str:
    return rewrite["prompt"].replace("{}", rewrite["subject"])
