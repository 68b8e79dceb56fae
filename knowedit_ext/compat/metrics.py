"""The forward passes of the other libraries' metrics, with the vocabulary's head at the scored tokens alone.

Where a library's padding shifts positions (EasyEdit pads on the left and gives no position ids: absolute positions
move, and so do the likeliest tokens), ours repeat it: the numbers are those of the library.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from knowedit_ext.evaluation.nll import Question, score

from .swap import NotServed
from .translate import opened


@torch.no_grad()
def test_prediction_acc(
    model: Any,
    tok: Any,
    hparams: Any,
    prompts: str | Sequence[str],
    targets: str | Sequence[str],
    device: Any,
    locality: bool = False,
    vanilla_generation: bool = False,
    *,
    upstream: Any = None,
) -> list[Any]:
    """EasyEdit's: for each prompt the share of the target's tokens that are the likeliest, each behind those before it
    (np.float64); with `locality` the likeliest tokens themselves (lists of int)."""
    if isinstance(prompts, str):
        prompts, targets = [prompts], [targets]
    if vanilla_generation:
        return [_greedy(model, tok, p, t, locality) for p, t in zip(prompts, targets, strict=True)]
    if not locality and getattr(hparams, "use_chat_template", False):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tok.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    texts = [f"{prompt} {target}" for prompt, target in zip(prompts, targets, strict=True)]
    longest = max(hparams.max_length, 1 + max(len(tok.encode(text)) for text in texts))
    inputs, alone = (_padded_left(tok, t, longest) for t in (texts, list(prompts)))
    ids = inputs["input_ids"]  # [texts, tokens]
    padding = (ids == tok.pad_token_id).sum(1)
    starts = (padding + (alone["input_ids"] != tok.pad_token_id).sum(1)).tolist()  # of the targets
    if min(starts) < 1:
        raise ValueError("an empty prompt: there is no token to predict the target's first one from")
    first = min(starts) - 1
    likeliest = _logits_from(model, inputs, first).argmax(-1).tolist()
    said = [row[start - 1 - first : -1] for row, start in zip(likeliest, starts, strict=True)]
    if locality:
        return said
    right = [
        np.mean(np.equal(row, ids[n, start:].tolist())) for n, (row, start) in enumerate(zip(said, starts, strict=True))
    ]
    return right if len(right) == 1 else [share for share in right if not np.isnan(share)]


def _padded_left(tok: Any, texts: Sequence[str], longest: int) -> Any:
    side, tok.padding_side = tok.padding_side, "left"
    try:
        return tok(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    finally:
        tok.padding_side = side


def _logits_from(model: Any, inputs: Any, first: int) -> torch.Tensor:
    """Logits [texts, tokens - first, vocab] of the tokens from `first` on."""
    inputs = inputs.to(next(model.parameters()).device)
    keep = inputs["input_ids"].shape[1] - first
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, logits_to_keep=keep).logits
    out = model(**inputs)
    return (out if isinstance(out, torch.Tensor) else out.logits)[:, -keep:]


def _greedy(model: Any, tok: Any, prompt: str, target: str, locality: bool) -> Any:
    """What the model itself writes, as many tokens as the target has."""
    wanted = tok.encode(target, add_special_tokens=False)
    inputs = tok(prompt, return_tensors="pt").to(next(model.parameters()).device)
    options = dict(max_new_tokens=len(wanted), pad_token_id=tok.eos_token_id, do_sample=False, use_cache=False)
    written = model.generate(**{k: inputs[k] for k in ("input_ids", "attention_mask")}, **options)
    written = written[0].tolist()[-len(wanted) :]
    return written if locality else np.mean(np.equal(wanted, written))


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
    found = [{"target_new": _float32(new.nll), "target_true": _float32(true.nll)} for new, true in scores]
    if "which_correct" not in given:
        return found
    return found, [pair[which].correct for pair, which in zip(scores, given["which_correct"], strict=True)]


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
