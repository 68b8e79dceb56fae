"""Tiny random models that can be taught: what a token says is not drowned by the token itself, answers can be sure."""

from __future__ import annotations

from functools import cache

import torch

import knowedit_ext as ke

from ..support.families import tiny_hf
from ..support.tokenizers import word_level


def fresh(family: str, seed: int = 0, **overrides) -> ke.EditableModel:
    """A new model, with a head of its own (a tied one repeats the last token) and no tight cap on its logits."""
    if family == "gemma2":
        overrides["final_logit_softcapping"] = 30.0
    hf = tiny_hf(family, seed, tie_word_embeddings=False, **overrides)
    with torch.no_grad():
        hf.get_input_embeddings().weight.mul_(0.25)
        hf.get_output_embeddings().weight.mul_(3.0)
    return ke.load_model((hf, word_level()))


@cache
def editable(family: str) -> ke.EditableModel:
    """Shared between tests, which leave it as it is."""
    return fresh(family)
