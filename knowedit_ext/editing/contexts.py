"""Context templates: what stands in front of a prompt while its key and value are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..model.forward import own_forward
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..model.tokens import encode

TOP_K = 5  # util/generate.py
STARTS = ("The", "Therefore", "Because", "I", "You")  # memit_main.py:296


@at_rest
def rome_contexts(model: EditableModel, lengths: Sequence[Sequence[int]], seed: int = 0) -> list[str]:
    """The bare prompt, and `count` generated texts of each `length` in tokens (rome_main.py:154-177)."""
    start = model.tokenizer.bos_token or model.tokenizer.eos_token or "The"
    texts = [text for length, count in lengths for text in _generate(model, [start] * count, length, seed + length)]
    return ["{}", *(f"{text}. {{}}" for text in texts)]


@at_rest
def memit_contexts(model: EditableModel, seed: int = 0, length: int = 10) -> list[list[str]]:
    """[[the bare prompt], [one generated text for each start]] (memit_main.py:290-309); groups weigh the same."""
    return [["{}"], [f"{text}. {{}}" for text in _generate(model, list(STARTS), length, seed)]]


def _generate(model: EditableModel, starts: list[str], length: int, seed: int) -> list[str]:
    """Sampled continuations (top 5), `length` tokens with their start; seeded, so an edit can be made again."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for start in starts:
        ids, _ = encode(model, start)
        prompt = torch.tensor([ids], device=model.device)
        while prompt.shape[1] < max(length, len(ids) + 1):
            logits = own_forward(model, prompt, use_cache=False).logits[0, -1].float().cpu()
            values, tokens = logits.topk(min(TOP_K, len(logits)))
            chosen = tokens[torch.multinomial(values.softmax(0), 1, generator=generator)]
            prompt = torch.cat([prompt, chosen[None].to(prompt.device)], dim=1)
        text = model.tokenizer.decode(prompt[0], skip_special_tokens=True)
        texts.append(" ".join(text.replace("{", " ").replace("}", " ").split()))
    return texts
