"""Questions asked under a noised subject: fact forcing is judged where it was edited (Hase et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..datasets.questions import Asked, Question, Score, Scores, TokenizedQuestion, rewrites_of
from ..editing.edit import Edit
from ..model.facts import Fact, TokenizedFact, tokenize_fact
from ..model.load import EditableModel
from ..model.spelling import mark_subject, marked_occurrence
from ..sweep.capture import EmbeddingNoise
from ..tracing.subject_noise import SubjectNoise
from .nll import tokenize_question

Ask = Callable[..., Asked]
NoiseOf = Callable[[Mapping[str, Any]], SubjectNoise | None]


@dataclass(frozen=True)
class _Part:
    """A question as it is asked once, about some of its targets."""

    number: int  # of the question that it is a part of
    targets: tuple[int, ...]
    question: TokenizedQuestion


def own_noise(edits: Edit | Sequence[Edit]) -> NoiseOf:
    """The noise that a record says, or under which its fact was edited, by prompt and subject; None for others."""
    requests = [r for edit in ([edits] if isinstance(edits, Edit) else edits) for r in edit.requests]
    asked = {(r.get("prompt"), r.get("subject")): SubjectNoise.of(r.get("noise")) for r in requests}

    def noise_of(record: Mapping[str, Any]) -> SubjectNoise | None:
        rewrite = rewrites_of(record)[0]
        own = SubjectNoise.of(rewrite.get("noise"))
        return own or asked.get((rewrite["prompt"], rewrite["subject"]))

    return noise_of


def under_noise(ask: Ask, noise_of: NoiseOf) -> Ask:
    """`ask`, whose questions are asked under the noise of their record, where it has one.

    Every prompt in which the record's subject stands is noised at it; probabilities are means over the draws. compat
    "hase": as released, see `_released`.
    """

    def ask_noised(
        model: EditableModel, record: Mapping[str, Any], edit: int, attributes: bool = False, compat: str | None = None
    ) -> Asked:
        questions, read = ask(model, record, edit, attributes, compat)
        noise = noise_of(record)
        if noise is None:
            return questions, read
        if isinstance(record["requested_rewrite"], list):
            raise ValueError("several facts are to be changed: noise is of the subject of one")
        parts = (_released if compat == "hase" else _drawn)(model, record, questions, noise)

        def means(scores: Scores) -> Scores:
            seen: dict[tuple[int, int], list[Score]] = {}
            for part, answers in zip(parts, scores, strict=True):
                for target, answer in zip(part.targets, answers, strict=True):
                    seen.setdefault((part.number, target), []).append(answer)
            return [[_mean(seen[n, k]) for k in range(_targets(q))] for n, q in enumerate(questions)]

        def read_means(scores: Scores, before: Scores | None = None) -> dict[str, Any]:
            return read(means(scores), None if before is None else means(before))

        return [part.question for part in parts], read_means

    return ask_noised


def _drawn(
    model: EditableModel, record: Mapping[str, Any], questions: Sequence[Question], noise: SubjectNoise
) -> list[_Part]:
    parts = []
    for number, question in enumerate(questions):
        every, whole = tuple(range(_targets(question))), tokenize_question(model, question)
        fact = _fact_in(model, record, _text(question))
        for draw in [None] if fact is None else noise.draws(model, fact):
            parts.append(_Part(number, every, replace(whole, noise=draw)))
    return parts


def _released(
    model: EditableModel, record: Mapping[str, Any], questions: Sequence[Question], noise: SubjectNoise
) -> list[_Part]:
    """A record's rows are its prompts, each with both targets, but row i is noised as prompt i is to be: only the first
    prompt with its first target is right. Rows beyond the number of prompts are not noised at all."""
    pairs = [q for q in questions if _targets(q) == 2]
    facts = [_fact_in(model, record, _text(question), first=True) for question in pairs]
    ranges = [None if fact is None else fact.subject_range for fact in facts]
    longest = max((after - start for start, after in filter(None, ranges)), default=0)
    state, level = np.random.RandomState(noise.seed), noise.resolve(model, record["requested_rewrite"]["subject"])
    drawn = level.draw(state, 2 * len(pairs), longest, model.hidden_size)
    parts, row = [], 0
    for number, question in enumerate(questions):
        whole = tokenize_question(model, question)
        for target in range(_targets(question)):
            place = ranges[row] if _targets(question) == 2 and row < len(ranges) else None
            added = None if place is None else EmbeddingNoise(place[0], drawn[row, : place[1] - place[0]])
            joint, shared = whole.joint[target : target + 1], whole.shared[target : target + 1]
            parts.append(_Part(number, (target,), replace(whole, joint=joint, shared=shared, noise=added)))
            row += _targets(question) == 2
    return parts


def _targets(question: Question | TokenizedQuestion) -> int:
    return len(question.joint if isinstance(question, TokenizedQuestion) else question.targets)


def _text(question: Question | TokenizedQuestion) -> str:
    if isinstance(question, TokenizedQuestion):
        raise ValueError("questions that are cut into tokens (zsRE, compat='reference') cannot be asked under noise")
    return question.prompt


def _fact_in(model: EditableModel, record: Mapping[str, Any], prompt: str, first: bool = False) -> TokenizedFact | None:
    """Where the record's subject stands in a prompt; None where it does not. first: its first occurrence, even within
    another word."""
    rewrite = record["requested_rewrite"]
    template, subject = rewrite["prompt"], rewrite["subject"]
    if subject not in prompt:
        return None
    if first:
        template = prompt.replace(subject, "{}", 1)
    elif template.replace("{}", subject) != prompt:
        template = mark_subject(prompt, subject, first=True)
    return tokenize_fact(model, Fact(template, subject, occurrence=marked_occurrence(template, subject)))


def _mean(scores: Sequence[Score]) -> Score:
    """Of draws: of the probability; a token is right where it is the likeliest in most of them."""
    if len(scores) == 1:
        return scores[0]
    count = len(scores[0].right)
    total = np.logaddexp.reduce([-score.nll * count for score in scores]) - math.log(len(scores))
    votes = np.mean([score.right for score in scores], axis=0)
    return Score(-float(total) / count, tuple(bool(vote > 0.5) for vote in votes))
