"""EasyEdit's token accuracy: all that is asked of a request in one pass, the vocabulary's head at the scored tokens.

EasyEdit pads on the left and gives no position ids: absolute positions move with the padding, and so do the likeliest
tokens. Ours have the positions that each of its calls would have, so that the numbers are its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from knowedit_ext.model.activations import fused_gelu
from knowedit_ext.model.wrappers import eager

from .swap import Upstream

Texts = str | Sequence[str]


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
        asked.answers = dict(zip(asked.questions, _answers(model, tok, hparams, asked.questions), strict=True))
    return list(asked.answers[question])


# -- asked together ----------------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """Questions that will be asked of one model, one after the other; answered with the first of them."""

    questions: list[Question]
    answers: dict[Question, list[Any]]


_ASKED: ContextVar[Asked | None] = ContextVar("asked", default=None)


@contextmanager
def asking(record: Mapping[str, Any]) -> Iterator[None]:
    """Inside, one model is asked what EasyEdit asks of a request."""
    pairs = [("prompt", "target_new"), ("rephrase_prompt", "target_new")]
    questions = [Question.of(record[p], record[t], False) for p, t in pairs if record.get(p) is not None]
    for kind in ("locality", "portability"):
        for part in (record.get(kind) or {}).values():
            questions.append(Question.of(part["prompt"], part["ground_truth"], kind == "locality"))
    token = _ASKED.set(Asked(list(dict.fromkeys(questions)), {}))
    try:
        yield
    finally:
        _ASKED.reset(token)


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
    sheets = [_sheet(tok, hparams, question) for question in questions]
    taken = inspect.signature(model.forward).parameters
    groups = [sheets] if "position_ids" in taken else [[sheet] for sheet in sheets]
    return [answer for group in groups for answer in _read(model, group, "logits_to_keep" in taken)]


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
    named = {"logits_to_keep": width - first} if can_keep else {}
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
