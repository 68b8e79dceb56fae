"""What a trace follows: the answer's tokens, the clean run over them, and the units its score is in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..checks import quoted
from ..model.errors import NotFiniteError
from ..model.facts import TokenizedFact
from ..model.head import log_probabilities
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..model.spelling import spaced
from ..model.tokens import encode
from ..sweep import CleanRun, Interventions, clean_run, sweep
from .settings import TraceSettings


@dataclass(frozen=True)
class Answer:
    """ids, text: of the answer; clean: the run over the prompt and all of the answer but its last token; readout: the
    positions that predict it; targets: int64 [positions, answers], the second being `against`; correct: does the model
    know the fact?"""

    ids: tuple[int, ...]
    text: str
    clean: CleanRun
    readout: range
    targets: torch.Tensor
    correct: bool


def answer_of(model: EditableModel, tokenized: TokenizedFact, settings: TraceSettings) -> Answer:
    """The fact's target, or where it has none the model's own answer."""
    ids, target = tokenized.ids, tokenized.target_ids
    own, clean = model_answer(model, ids, 1 if target else settings.answer_tokens)
    answer = target or own
    if len(answer) > 1:
        clean = clean_run(model, ids + answer[:-1])
    answers = [answer]
    if settings.against is not None:
        answers.append(_against(model, tokenized, settings.against, len(answer)))
    given = tokenized.fact.target
    return Answer(
        ids=answer,
        text=given if given is not None else model.tokenizer.decode(list(answer)),
        clean=clean,
        readout=range(len(ids) - 1, len(clean.ids)),
        targets=torch.tensor(answers).T,
        correct=knows(model, tokenized, settings.answer_tokens, own),
    )


def _against(model: EditableModel, tokenized: TokenizedFact, against: str, tokens: int) -> tuple[int, ...]:
    text, length = tokenized.fact.text, len(tokenized.ids)
    against = spaced(against, text, tokenized.fact.space)
    joint, _ = encode(model, text + against)
    if tokens > 1 or len(joint) != length + 1 or tuple(joint[:length]) != tokenized.ids:
        raise ValueError(
            f"score='logit_difference' compares two answers of one token; {quoted(against)} after "
            f"{quoted(text)} has {len(joint) - length}, the answer has {tokens}"
        )
    return (joint[-1],)


class Plan(Protocol):
    """One fact's prompt: the rows of its roots that enter layer 0, and what is read there."""

    answer: Answer

    @property
    def hidden(self) -> Sequence[torch.Tensor]: ...


def scores_of(
    model: EditableModel, plans: Sequence[Plan], interventions: Interventions, settings: TraceSettings
) -> list[np.ndarray]:
    """Sweep all runs, all read out where their plan's answer is predicted; by run its score [copies]."""
    prompts = [plan.answer.clean for plan in plans]
    result = sweep(model, prompts, interventions, [x for plan in plans for x in plan.hidden], settings.max_rows)
    targets = [
        torch.zeros(len(prompt.ids), 1 + (settings.against is not None), dtype=torch.int64) for prompt in prompts
    ]
    for plan, here in zip(plans, targets, strict=True):
        here[list(plan.answer.readout)] = plan.answer.targets  # [positions, answers]
    wanted = torch.cat(targets)[result.plan.places]
    logp = log_probabilities(model, result.states, wanted).double().cpu()
    if not logp.isfinite().all():
        raise NotFiniteError(
            f"'{model.name}' gives log-probabilities that are no finite numbers: are its weights finite, and is "
            f"{model.dtype} wide enough for it?"
        )
    scores: list[np.ndarray] = [np.empty(0)] * len(interventions.runs)
    for runs, index in result.plan.alike:
        for run, score in zip(runs, answer_score(logp[index], settings.score).numpy(), strict=True):
            scores[run] = score
    return scores


def answer_score(logp: torch.Tensor, score: str) -> torch.Tensor:
    """log-probabilities [copies, positions, answers] -> [copies], in the units of the score."""
    if score == "logit_difference":
        return (logp[..., 0] - logp[..., 1]).sum(-1)  # the softmax's normaliser cancels
    total = logp[..., 0].sum(-1)
    return total if score == "logprob" else total.exp()


@at_rest
def model_answer(model: EditableModel, ids: tuple[int, ...], tokens: int) -> tuple[tuple[int, ...], CleanRun]:
    """The model's greedy continuation, and the clean run of the prompt alone."""
    most = model.modules.max_positions
    if most is not None and len(ids) + tokens - 1 > most:
        raise ValueError(f"prompt and answer take {len(ids) + tokens - 1} positions, the model has {most} positions")
    clean = clean_run(model, ids)
    own = (int(clean.logits.argmax()),)
    while len(own) < tokens:
        own += (int(clean_run(model, ids + own).logits.argmax()),)
    return own, clean


def knows(model: EditableModel, tokenized: TokenizedFact, answer_tokens: int, own: tuple[int, ...] = ()) -> bool:
    """Does the model say the fact's attribute (causal_trace.py:317-320)? True where the fact has none.

    As published it is compared with the model's answer, `answer_tokens` long (`own`, where that is known): what is
    traced. Where a target of the fact's own is traced, the attribute may take as many tokens as it takes.
    """
    attribute = tokenized.fact.attribute
    if attribute is None:
        return True
    if tokenized.target_ids:
        return _spells(model, tokenized.ids, attribute.strip())
    own = own or model_answer(model, tokenized.ids, answer_tokens)[0]
    return model.tokenizer.decode(list(own)).strip() == attribute.strip()


def _spells(model: EditableModel, ids: tuple[int, ...], text: str) -> bool:
    """Does the model's greedy continuation come to read `text`?"""
    most, own = model.modules.max_positions, ()
    for _ in range(len(text.encode()) + 1):  # a token may be a space, or a byte of a character
        if most is not None and len(ids) + len(own) > most:
            return False
        own += (int(clean_run(model, ids + own).logits.argmax()),)
        decoded = model.tokenizer.decode(list(own)).strip()
        if decoded == text:
            return True
        if not text.startswith(decoded.rstrip("\ufffd")):
            return False
    return False
