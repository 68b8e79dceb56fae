"""What a model is asked about a record, and what it answers: the common language of data sets and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..sweep.capture import EmbeddingNoise


@dataclass(frozen=True)
class Question:
    """A prompt, the texts to score behind it (with their leading space), the number of the edit it is asked under."""

    prompt: str
    targets: tuple[str, ...]
    edit: int = 0


@dataclass(frozen=True)
class TokenizedQuestion:
    """ids: the prompt's; joint: for each target the ids of prompt and target together; shared: how many tokens of these
    are the prompt's own, so that the target is joint[shared:]. edit: as in `Question`. noise: what is added to the
    embeddings of the prompt's first shared tokens."""

    ids: tuple[int, ...]
    joint: tuple[tuple[int, ...], ...]
    shared: tuple[int, ...]
    edit: int = 0
    noise: EmbeddingNoise | None = None

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

    @property
    def probability(self) -> float:
        """Of all the target's tokens: their product."""
        return math.exp(-self.nll * len(self.right))


# Questions, and what turns their scores (a `Score` for each target) into a case's "pre" or "post".
Asked = tuple[list[Question | TokenizedQuestion], Callable[[Sequence[Sequence[Score]]], dict[str, Any]]]

# What a record may have beyond the published schema: prompts with one answer of their own.
EXTRAS = ("same_subject_prompts", "reversal_prompts", "portability_prompts")


def filled(rewrite: Mapping[str, Any]) -> str:
    """The prompt of a requested rewrite, with its subject."""
    return rewrite["prompt"].replace("{}", rewrite["subject"])
