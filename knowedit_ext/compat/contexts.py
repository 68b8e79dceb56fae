"""Generated text and context templates, as the other libraries make them.

Their `generate_fast` cuts the attention mask under a cache of keys: from transformers 4.57 on it writes garbage.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import torch

from knowedit_ext.evaluation.generation import generate

from .translate import opened

STARTS = ("The", "Therefore", "Because", "I", "You")
MEMIT_LENGTHS = ((10, 5),)


def generate_fast(
    model: Any,
    tok: Any,
    prompts: Sequence[str],
    n_gen_per_prompt: int = 1,
    top_k: int = 5,
    max_out_len: int = 200,
    vanilla_generation: bool = False,
    *,
    upstream: Any = None,
) -> list[str]:
    """Each prompt with `n_gen_per_prompt` continuations; `max_out_len` counts the prompt's tokens.

    Sampled from the `top_k` likeliest tokens, by seeds from torch's global generator: `torch.manual_seed` before it
    gives the same texts again. vanilla_generation: `model.generate`, with `max_out_len` new tokens.
    """
    texts = [prompt for prompt in prompts for _ in range(n_gen_per_prompt)]
    if vanilla_generation:
        return _generated(model, tok, texts, max_out_len)
    with opened(model, tok) as editable:
        seeds = torch.randint(2**62, (len(texts),)).tolist()
        return generate(editable, texts, seeds, max_length=max_out_len, top_k=top_k)


@torch.no_grad()
def _generated(model: Any, tok: Any, texts: Sequence[str], new: int) -> list[str]:
    inputs = tok(list(texts), padding=True, return_tensors="pt").to(next(model.parameters()).device)
    ids = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=new)
    decoded = [unicodedata.normalize("NFKD", tok.decode(row, skip_special_tokens=True)) for row in ids]
    return [text.replace("\n\n", " ").replace("<|endoftext|>", "") for text in decoded]


def rome_templates(model: Any, tok: Any, lengths: Sequence[Sequence[int]]) -> list[str]:
    """The bare prompt, and texts of each (length, how many) over five starts, "{}" behind each."""
    return ["{}", *(text for length, count in lengths for text in _texts(model, tok, length, count, ""))]


def memit_templates(model: Any, tok: Any) -> list[list[str]]:
    """Groups: the bare prompt, five texts."""
    return [["{}"], *(_texts(model, tok, length, count, " ") for length, count in MEMIT_LENGTHS)]


def _texts(model: Any, tok: Any, length: int, count: int, brace: str) -> list[str]:
    """brace: what comes in the place of braces, which templates must not have."""
    texts = generate_fast(model, tok, STARTS, n_gen_per_prompt=count // len(STARTS), max_out_len=length)
    return [text.replace("{", brace).replace("}", brace) + ". {}" for text in texts]
