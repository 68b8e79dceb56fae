"""EasyEdit's token accuracy: all that is asked of a request in one pass, the vocabulary's head at the scored tokens.

EasyEdit pads on the left and gives no position ids: absolute positions move with the padding, and so do the likeliest
tokens. Ours have the positions that each of its calls would have, so that the numbers are its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from knowedit_ext.model.activations import fused_gelu
from knowedit_ext.model.wrappers import eager

from .swap import Upstream

Texts = str | Sequence[str]
REQUESTS = 32  # that are answered in advance
TOKENS = 1024  # with padding, that one pass holds


@dataclass(frozen=True)
class Question:
    """A call's prompts and targets; locality: the likeliest tokens are asked for, not how many are right."""

    prompts: tuple[str, ...]
    targets: tuple[str, ...]
    locality: bool

    @classmethod
    def of(cls, prompts: Texts, targets: Texts, locality: bool) -> Question:
        if isinstance(prompts, str):
            prompts, targets = [prompts], [targets]
        return cls(tuple(prompts), tuple(targets), locality)


def test_prediction_acc(
    model: Any,
    tok: Any,
    hparams: Any,
    prompts: Texts,
    targets: Texts,
    device: Any,
    locality: bool = False,
    vanilla_generation: bool = False,
    *,
    upstream: Upstream | None = None,
) -> list[Any]:
    """For each prompt the share of the target's tokens that are the likeliest, each behind those before it
    (np.float64); with `locality` the likeliest tokens themselves (lists of int)."""
    question = Question.of(prompts, targets, locality)
    if vanilla_generation:
        pairs = zip(question.prompts, question.targets, strict=True)
        return [_greedy(model, tok, prompt, target, locality) for prompt, target in pairs]
    asked = _ASKED.get()
    if asked is None or question not in asked.questions:
        return _answers(model, tok, hparams, [question])[0]
    if not asked.answers:
        expected, answer = _EXPECTED.get(), partial(_answers, model, tok, hparams)
        known = None if expected is None else expected.take(asked.record, model, answer)
        asked.answers = known or dict(zip(asked.questions, answer(asked.questions), strict=True))
    return list(asked.answers[question])


# -- asked together ----------------------------------------------------------------------------------------------------


def questions_of(record: Mapping[str, Any]) -> list[Question]:
    """What EasyEdit asks of a request."""
    pairs = [("prompt", "target_new"), ("rephrase_prompt", "target_new")]
    questions = [Question.of(record[p], record[t], False) for p, t in pairs if record.get(p) is not None]
    for kind in ("locality", "portability"):
        for part in (record.get(kind) or {}).values():
            questions.append(Question.of(part["prompt"], part["ground_truth"], kind == "locality"))
    return list(dict.fromkeys(questions))


@dataclass
class Asked:
    """Questions that will be asked of one model, one after the other; answered with the first of them."""

    record: Mapping[str, Any]
    questions: list[Question]
    answers: dict[Question, list[Any]]


_ASKED: ContextVar[Asked | None] = ContextVar("asked", default=None)


@contextmanager
def asking(record: Mapping[str, Any]) -> Iterator[None]:
    """Inside, one model is asked what EasyEdit asks of a request."""
    token = _ASKED.set(Asked(record, questions_of(record), {}))
    try:
        yield
    finally:
        _ASKED.reset(token)


@dataclass
class Expected:
    """Requests whose metrics will be asked for before the model changes; each is answered in advance once."""

    records: Sequence[Mapping[str, Any]]
    known: dict[int, dict[Question, list[Any]]] = field(default_factory=dict)  # by place
    asked: int = 0  # places before it have been answered
    state: Any = None

    def take(
        self, record: Mapping[str, Any], model: Any, answer: Callable[[Sequence[Question]], list[list[Any]]]
    ) -> dict[Question, list[Any]] | None:
        """The answers to what is asked of `record`, with which those to the next ones come; None where it has been
        answered already, or the model has changed since."""
        state = _state(model)
        if state is None or self.state not in (None, state):
            self.records, self.known = (), {}
        place = next((n for n, one in enumerate(self.records) if one is record), None)
        if place is None:
            return None
        if place >= self.asked:
            chosen = range(place, min(place + REQUESTS, len(self.records)))
            asked = {n: questions_of(self.records[n]) for n in chosen}
            every = list(dict.fromkeys(question for questions in asked.values() for question in questions))
            answers = dict(zip(every, answer(every), strict=True))
            self.known |= {n: {question: answers[question] for question in asked[n]} for n in chosen}
            self.asked, self.state = chosen.stop, state
        return self.known.pop(place, None)


_EXPECTED: ContextVar[Expected | None] = ContextVar("expected", default=None)


@contextmanager
def expecting(records: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Inside, metrics of each of `records` (these very objects) will be asked for before anything is edited."""
    token = _EXPECTED.set(Expected(list(records)))
    try:
        yield
    finally:
        _EXPECTED.reset(token)


def _state(model: Any) -> Any:
    """Another one once a weight has been written to; None where that cannot be told."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return id(model), [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors]


def compute_edit_quality(
    model: Any,
    model_name: str,
    hparams: Any,
    tok: Any,
    record: Mapping[str, Any],
    *args: Any,
    upstream: Upstream,
    **kwargs: Any,
) -> Any:
    """EasyEdit's own, over metrics of ours."""
    with asking(record):
        return upstream.function(model, model_name, hparams, tok, record, *args, **kwargs)


# -- answers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """A question as EasyEdit's call feeds it: ids and mask [texts, tokens], where each target starts."""

    question: Question
    ids: torch.Tensor
    mask: torch.Tensor
    starts: list[int]

    def answer(self, likeliest: list[list[int]], first: int) -> list[Any]:
        """likeliest: of the tokens from `first` on, for each text."""
        answers = [row[start - 1 - first : -1] for row, start in zip(likeliest, self.starts, strict=True)]
        if self.question.locality:
            return answers
        wanted = [row[start:] for row, start in zip(self.ids.tolist(), self.starts, strict=True)]
        right = [np.mean(np.equal(*pair)) for pair in zip(answers, wanted, strict=True)]
        return right if len(right) == 1 else [share for share in right if not np.isnan(share)]


def _answers(model: Any, tok: Any, hparams: Any, questions: Sequence[Question]) -> list[list[Any]]:
    """In passes over sheets of about the same width."""
    sheets = [_sheet(tok, hparams, question) for question in questions]
    taken = inspect.signature(model.forward).parameters
    together, groups = "position_ids" in taken, []
    rows = 0
    for number in sorted(range(len(sheets)), key=lambda n: sheets[n].ids.shape[1], reverse=True):
        count, widest = len(sheets[number].ids), sheets[groups[-1][0] if groups else number].ids.shape[1]
        if not groups or not together or (rows + count) * widest > TOKENS:
            groups.append([])
            rows = 0
        groups[-1].append(number)
        rows += count
    answers: dict[int, list[Any]] = {}
    for group in groups:
        read = _read(model, [sheets[number] for number in group], "logits_to_keep" in taken)
        answers |= dict(zip(group, read, strict=True))
    return [answers[number] for number in range(len(sheets))]


def _sheet(tok: Any, hparams: Any, question: Question) -> Sheet:
    prompts: Sequence[str] = list(question.prompts)
    if not question.locality and getattr(hparams, "use_chat_template", False):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tok.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    texts = [f"{prompt} {target}" for prompt, target in zip(prompts, question.targets, strict=True)]
    longest = max(hparams.max_length, 1 + max(len(tok.encode(text)) for text in texts))
    inputs, alone = (_padded_left(tok, t, longest) for t in (texts, prompts))
    padding = (inputs["input_ids"] == tok.pad_token_id).sum(1)
    starts = (padding + (alone["input_ids"] != tok.pad_token_id).sum(1)).tolist()
    if min(starts) < 1:
        raise ValueError("an empty prompt: there is no token to predict the target's first one from")
    return Sheet(question, inputs["input_ids"], inputs["attention_mask"], starts)


def _padded_left(tok: Any, texts: Sequence[str], longest: int) -> Any:
    side, tok.padding_side = tok.padding_side, "left"
    try:
        return tok(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    finally:
        tok.padding_side = side


@torch.no_grad()
def _read(model: Any, sheets: Sequence[Sheet], can_keep: bool) -> list[list[Any]]:
    """One pass over sheets of different widths: each is moved to the right, its positions go along."""
    width = max(sheet.ids.shape[1] for sheet in sheets)
    shifts = [width - sheet.ids.shape[1] for sheet in sheets]
    pad = lambda x, shift: torch.nn.functional.pad(x, (shift, 0))  # noqa: E731
    inputs = {
        "input_ids": torch.cat([pad(sheet.ids, shift) for sheet, shift in zip(sheets, shifts, strict=True)]),
        "attention_mask": torch.cat([pad(sheet.mask, shift) for sheet, shift in zip(sheets, shifts, strict=True)]),
    }
    if any(shifts):
        positions = [
            (torch.arange(width) - shift).clamp_min(0).expand(len(sheet.ids), -1)
            for sheet, shift in zip(sheets, shifts, strict=True)
        ]
        inputs["position_ids"] = torch.cat(positions)
    first = min(min(sheet.starts) + shift for sheet, shift in zip(sheets, shifts, strict=True)) - 1
    device = next(model.parameters()).device
    # By their numbers: a slice of several texts torch would multiply with the head text by text.
    named = {"logits_to_keep": torch.arange(first, width)} if can_keep else {}
    with eager(), fused_gelu(model):
        out = model(**{name: value.to(device) for name, value in inputs.items()}, **named)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    likeliest = logits[:, first - width :].argmax(-1)  # [texts, width - first]
    rows = likeliest.split([len(sheet.ids) for sheet in sheets])
    return [s.answer(r.tolist(), first - shift) for s, r, shift in zip(sheets, rows, shifts, strict=True)]


@torch.no_grad()
def _greedy(model: Any, tok: Any, prompt: str, target: str, locality: bool) -> Any:
    """What the model itself writes, as many tokens as the target has."""
    wanted = tok.encode(target, add_special_tokens=False)
    inputs = tok(prompt, return_tensors="pt").to(next(model.parameters()).device)
    options = dict(max_new_tokens=len(wanted), pad_token_id=tok.eos_token_id, do_sample=False, use_cache=False)
    written = model.generate(**{k: inputs[k] for k in ("input_ids", "attention_mask")}, **options)
    written = written[0].tolist()[-len(wanted) :]
    return written if locality else np.mean(np.equal(wanted, written))
