"""rome and memit's metrics: a prompt runs once for its targets, the vocabulary's head at scored tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from knowedit_ext.evaluation.nll import Question, score

from .swap import NotServed
from .translate import opened


def test_batch_prediction(
    model: Any, tok: Any, prefixes: Sequence[str], *arguments: Any, upstream: Any = None, **named: Any
) -> Any:
    """rome's (model, tok, prefixes, target_new, target_true) and memit's, with `which_correct` behind the prefixes.

    The mean negative log-probability of each target's tokens behind each prefix; memit's also whether all tokens of the
    target that `which_correct` names (0: new, 1: true) are the likeliest.
    """
    names = ["target_new", "target_true"]
    if "which_correct" in named or len(arguments) + len(named) == 3:
        names.insert(0, "which_correct")
    given = dict(zip(names, arguments, strict=False)) | named
    if tok.padding_side != "right":
        raise NotServed("padding on the left shifts the tokens that are read")
    targets = (f" {given['target_new']}", f" {given['target_true']}")
    with opened(model, tok) as editable:
        scores, _ = score(editable, [Question(prefix, targets) for prefix in prefixes])
    nlls = [{"target_new": _float32(new.nll), "target_true": _float32(true.nll)} for new, true in scores]
    if "which_correct" not in given:
        return nlls
    return nlls, [pair[which].correct for pair, which in zip(scores, given["which_correct"], strict=True)]


def _float32(value: float) -> float:
    return float(np.float32(value))


@torch.no_grad()
def test_batch_prediction_acc(
    model: Any, tok: Any, prompts: Sequence[str], target: Sequence[str], *, upstream: Any = None
) -> list[bool]:
    """kmeng01's, for zsRE: is the first token of each target, tokenised alone, the likeliest behind its prompt?"""
    if tok.padding_side != "right":
        raise NotServed("padding on the left shifts the positions")
    wanted = torch.tensor([ids[0] for ids in tok(list(target))["input_ids"]])
    inputs = tok(list(prompts), padding=True, return_tensors="pt").to(next(model.parameters()).device)
    last = inputs["attention_mask"].sum(1) - 1
    read, where = last.unique(return_inverse=True)
    logits = model(**inputs, logits_to_keep=read).logits  # [prompts, different lengths, vocab]
    likeliest = logits[torch.arange(len(where)), where].argmax(-1)
    return (likeliest.cpu() == wanted).tolist()
