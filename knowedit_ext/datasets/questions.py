"""What a model is asked about a record, and what it answers: the common language of data sets and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.spelling import spaced


@dataclass(frozen=True)
class Question:
    """A prompt, the texts to score behind it (with their leading space), the number of the edit it is asked under."""

    prompt: str
    targets: tuple[str, ...]
    edit: int = 0


@dataclass(frozen=True)
class TokenizedQuestion:
    """ids: the prompt's; joint: for each target the ids of prompt and target together; shared: how many tokens of these
    are the prompt's own, so that the target is joint[shared:]. edit: as in `Question`."""

    ids: tuple[int, ...]
    joint: tuple[tuple[int, ...], ...]
    shared: tuple[int, ...]
    edit: int = 0

    @property
    def rows(self) -> int:
        return len(self.ids) + sum(len(j) - s - 1 for j, s in zip(self.joint, self.shared, strict=True))


@dataclass(frozen=True)
class Score:
    """nll: mean negative log-probability of the target's tokens, teacher forced, in nats.

    right: for each of them whether it was the likeliest.
    """

    nll: float
    right: tuple[bool, ...]

    @property
    def correct(self) -> bool:
        return all(self.right)


# Questions, and what turns their scores (a `Score` for each target) into a case's "pre" or "post".
Asked = tuple[list[Question | TokenizedQuestion], Callable[[Sequence[Sequence[Score]]], dict[str, Any]]]

# Asked beyond the published metrics, where a record has them: prompts with one answer of their own.
EXTRAS = ("same_subject_prompts", "reversal_prompts", "portability_prompts")


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
    """The prompt of a requested rewrite, with its subject."""
    return rewrite["prompt"].replace("{}", rewrite["subject"])
