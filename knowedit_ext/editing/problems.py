"""The five editing problems of "Does localization inform editing?" (Hase et al. 2023), as requests.

A problem is what is asked: a target, a direction, an input. Steps, rates and bounds are a method's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from reprlib import repr as brief
from typing import Any, Literal

import numpy as np
import torch

from ..checks import StudyCompat, typed
from ..model.facts import TokenizedFact, tokenize_fact
from ..model.head import final_states, logits
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..sweep.capture import EmbeddingNoise, clean_runs
from ..sweep.packed import PackedPrompts
from ..tracing.subject_noise import SubjectNoise
from .request import EditRequest

LONGEST, TOP_K = 12, 5  # of the released reversal's text, the prompt's tokens included; and what it is sampled from


@dataclass(frozen=True)
class Problem:
    """target: the record's new object, its true one, or what the model says under a noised subject. minimise: make the
    target less likely. noised: the subject is noised while editing and in evaluation. title: one line of help."""

    name: str
    target: Literal["new", "true", "noised"]
    minimise: bool
    noised: bool
    title: str


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("error_injection", "new", False, False, "say the false object"),
        Problem("tracing_reversal", "noised", False, False, "say what is said when the subject is noised"),
        Problem("fact_erasure", "true", True, False, "say the true object less"),
        Problem("fact_amplification", "true", False, False, "say the true object more"),
        Problem("fact_forcing", "true", False, True, "say the true object when the subject is noised"),
    )
}


def problem_of(name: object) -> Problem:
    if not isinstance(name, str) or name not in PROBLEMS:
        raise ValueError(f"unknown problem {brief(name)}: expected one of {', '.join(PROBLEMS)}")
    return PROBLEMS[name]


@at_rest
@typed
def as_problem(
    model: EditableModel,
    record: EditRequest | Mapping[str, Any],
    name: str,
    noise: SubjectNoise | float | str = "s3",
    *,
    compat: StudyCompat = None,
) -> EditRequest:
    """A CounterFact record (or a request with a true target) as a problem of this name.

    noise: of the two problems that have one, a `SubjectNoise` or its level; a rule is taken over the record's subject.
    compat: "hase": as released, tracing reversal asks for the prompt and what follows it, 12 tokens in all, sampled of
        the five likeliest (here with the noise's seed); None: for the model's own greedy continuation of the noised
        prompt, of as many tokens as the true target has.

    Raises ValueError for an unknown problem and for a record without a true target.
    """
    problem = problem_of(name)
    asked = EditRequest.of(record)
    if asked.target_true is None:
        raise ValueError(f"'{asked.prompt}' ('{asked.subject}') has no target_true: no {name} can be made of it")
    level = _settled(model, SubjectNoise.of(noise), asked.subject)
    if problem.target == "new":
        return replace(asked, minimise=problem.minimise, noise=level if problem.noised else None)
    if problem.target == "true":
        return replace(
            asked, target_new=asked.target_true, minimise=problem.minimise, noise=level if problem.noised else None
        )
    return replace(asked, target_new=_noised_answer(model, asked, level, compat), space=False)


def problem_record(record: Mapping[str, Any], request: EditRequest) -> dict[str, Any]:
    """The record as it is edited and evaluated: about the request's target, in its direction, under its noise."""
    rewrite = record["requested_rewrite"]
    targets = {
        "target_new": {**rewrite["target_new"], "str": request.target_new},
        "target_true": {**rewrite["target_true"], "str": request.target_true},
    }
    asked = {"minimise": request.minimise, "noise": None if request.noise is None else request.noise.to_dict()}
    return {**record, "requested_rewrite": {**rewrite, **targets, "space": False, **asked}}


def _settled(model: EditableModel, noise: SubjectNoise, subject: str) -> SubjectNoise:
    """With a number for a rule, where a number says the same."""
    resolved = noise.resolve(model, subject)
    return noise if resolved.uniform else replace(noise, level=resolved.level)


def _noised_answer(model: EditableModel, asked: EditRequest, noise: SubjectNoise, compat: str | None) -> str:
    fact = tokenize_fact(model, replace(asked, target_new=asked.target_true).fact())
    (draw, *_) = replace(noise, samples=1).draws(model, fact)
    if compat == "hase":
        state = np.random.RandomState(noise.seed)
        ids = list(fact.ids)
        while len(ids) < LONGEST:
            values, tokens = _logits(model, ids, draw).topk(TOP_K)
            ids.append(int(tokens[state.choice(len(tokens), p=_shares(values))]))
        return model.tokenizer.decode(ids, skip_special_tokens=True)
    return _greedy(model, fact, draw, len(fact.target_ids))


def _greedy(model: EditableModel, fact: TokenizedFact, noise: EmbeddingNoise, least: int) -> str:
    """`least` tokens, or as many more as it takes to say something."""
    ids: list[int] = []
    text = ""
    while len(ids) < least or (not text.strip() and len(ids) < LONGEST):
        ids.append(int(_logits(model, [*fact.ids, *ids], noise).argmax()))
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
    if not text.strip():
        raise ValueError(
            f"under a noised subject the model says nothing behind '{fact.fact.text}': no target to ask for"
        )
    return text


def _logits(model: EditableModel, ids: list[int], noise: EmbeddingNoise) -> torch.Tensor:
    """[vocab] behind a prompt whose subject is noised."""
    packed = PackedPrompts(model, clean_runs(model, [ids], [noise]))
    hidden = packed.run(packed.start, 0, model.num_layers)
    return logits(model, final_states(model, hidden[-1:]))[0].cpu()


def _shares(values: torch.Tensor) -> np.ndarray:
    shares = values.double().softmax(0).numpy()
    return shares / shares.sum()
