"""Tiny random models that can be taught: what a token says is not drowned by the token itself, answers can be sure."""

from __future__ import annotations

from functools import cache

import torch

import knowedit_ext as ke
from knowedit_ext.editing.request import EditRequest

from ..support.families import WIDTH, tiny_hf
from ..support.tokenizers import word_level


def fresh(family: str, seed: int = 0, **overrides) -> ke.EditableModel:
    """A new model, with a head of its own (a tied one repeats the last token) and no tight cap on its logits.

    Its MLPs are wide, so that a rank-one change for one key leaves most others alone.
    """
    if family not in ("gpt2", "gptj"):  # 4 x hidden by themselves
        overrides.setdefault("intermediate_size", 4 * WIDTH)
    if family == "gemma2":
        overrides["final_logit_softcapping"] = 30.0
    hf = tiny_hf(family, seed, **overrides)
    head = hf.get_output_embeddings()
    head.weight = torch.nn.Parameter(3.0 * head.weight.detach())
    with torch.no_grad():
        hf.get_input_embeddings().weight.mul_(0.25)
    return ke.load_model((hf, word_level()))


@cache
def editable(family: str) -> ke.EditableModel:
    """Shared between tests, which leave it as it is."""
    return fresh(family)


@torch.no_grad()
def unlikely(model: ke.EditableModel, prompt: str, subject: str, most: float = 0.05) -> EditRequest:
    """A request for the likeliest word of those that the model gives less than `most`."""
    ids = model.tokenizer(prompt.replace("{}", subject)).input_ids
    p = model.hf(torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1)
    p[:2] = 1.0  # the unknown word and the BOS token
    return EditRequest(prompt, subject, f"w{int(torch.where(p < most, p, 0.0).argmax())}")
