"""What a model is asked about a record, and what it answers: the common language of data sets and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..model.spelling import spaced

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

    right: for each of them whether it was the likeliest. said: the likeliest tokens; none where draws are averaged.
    """

    nll: float
    right: tuple[bool, ...]
    said: tuple[int, ...] = ()

    @property
    def correct(self) -> bool:
        return all(self.right)

    @property
    def share(self) -> float:
        """Of its tokens, how many are the likeliest."""
        return sum(self.right) / len(self.right)

    @property
    def probability(self) -> float:
        """Of all the target's tokens: their product."""
        return math.exp(-self.nll * len(self.right))


# Of each question a `Score` for each target.
Scores = Sequence[Sequence[Score]]

# Questions, and what turns their scores into a case's "pre" or "post". It is also given what the unedited model scored:
# None where that was not measured, or is what is read.
Asked = tuple[list[Question | TokenizedQuestion], Callable[[Scores, Scores | None], dict[str, Any]]]

# What a record may have beyond the published schema: prompts with one answer of their own, under several names maybe.
PORTABILITY = {
    "portability_prompts": "port.",
    "subject_aliasing_prompts": "port. alias",
    "reasoning_prompts": "port. reasoning",
    "logical_generalization_prompts": "port. logic",
    "persona_prompts": "port. persona",
    "multi_hop_prompts": "port. hops",
}
LOCALITY = {"relation_specificity_prompts": "loc. relation", "forgetfulness_prompts": "loc. forget"}
EXTRAS = ("same_subject_prompts", "reversal_prompts", *PORTABILITY, *LOCALITY)


def rewrites_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a record asks to be changed: one fact, or several that belong together."""
    rewrite = record["requested_rewrite"]
    return list(rewrite) if isinstance(rewrite, list) else [rewrite]


def asked_texts(record: Mapping[str, Any]) -> dict[str, str | None]:
    """prompt, target_new and target_true (None: not known) in words; those of several facts in one line."""
    rewrites = rewrites_of(record)
    texts: dict[str, str | None] = {"prompt": "; ".join(map(filled, rewrites))}
    for name in ("target_new", "target_true"):
        texts[name] = "; ".join(rewrite[name]["str"] for rewrite in rewrites if rewrite.get(name)) or None
    return texts


def spellings(pair: Mapping[str, Any], prompt: str, space: bool | None) -> tuple[str, ...]:
    """A target and its aliases as they go on from a prompt, each once."""
    return tuple(dict.fromkeys(spaced(text, prompt, space) for text in (pair["target"], *pair.get("aliases", ()))))


def filled(rewrite: Mapping[str, Any]) -> str:
    """The prompt of a requested rewrite, with its subject."""
    return rewrite["prompt"].replace("{}", rewrite["subject"])
