"""Causal tracing as rome and memit's `experiments/causal_trace.py` reports it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import knowedit_ext as ke
from knowedit_ext.model.tokens import encode
from knowedit_ext.tracing.answer import model_answer

from .swap import NotServed
from .translate import opened


def calculate_hidden_flow(
    mt: Any,
    prompt: str,
    subject: str,
    samples: int = 10,
    noise: Any = 0.1,
    token_range: str | None = None,
    uniform_noise: bool = False,
    replace: bool = False,
    window: int = 10,
    kind: str | None = None,
    expect: str | None = None,
    *,
    upstream: Any = None,
) -> dict[str, Any]:
    """Every token and layer restored; their dict, of the same types. Only `correct_prediction` where the model does not
    say what is expected."""
    if token_range not in (None, "subject_last"):
        raise ValueError(f"Unknown token_range: {token_range}")
    if uniform_noise and callable(noise):
        raise NotServed("a sampler over uniform draws")
    with opened(mt.model, mt.tokenizer) as model:
        if expect is not None and _answer(model, prompt).strip() != expect:
            return {"correct_prediction": False}
        fact = ke.Fact.from_prompt(prompt, subject, occurrence=0)
        options = dict(tokens=token_range, compat="reference", replace=bool(replace), window=window if kind else None)
        level = f"u{noise}" if uniform_noise else noise
        t = ke.trace(model, fact, kind or "state", samples=samples, noise=level, **options)
    rows = slice(*((t.subject_range[1] - 1, t.subject_range[1]) if token_range else (None,)))
    return {
        "scores": torch.from_numpy(t.scores[rows].copy()),
        "low_score": t.low_score,
        "high_score": torch.tensor(t.high_score, dtype=torch.float32),
        "input_ids": torch.from_numpy(np.array(t.input_ids)).to(model.device),
        "input_tokens": list(t.tokens),
        "subject_range": tuple(t.subject_range),
        "answer": t.answer,
        "window": window,
        "correct_prediction": True,
        "kind": kind or "",
    }


def _answer(model: ke.EditableModel, prompt: str) -> str:
    tokens, _ = model_answer(model, tuple(encode(model, prompt)[0]), 1)
    return model.tokenizer.decode(list(tokens))
