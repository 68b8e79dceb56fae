"""What a model writes behind prompts when it always takes the likeliest token."""

from __future__ import annotations

from collections.abc import Sequence

from ..checks import Count, typed
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..model.tokens import encode
from .generation import continuations


@at_rest
@typed
def written(model: EditableModel, prompts: Sequence[str], tokens: Count = 20) -> list[str]:
    """The text of `tokens` tokens behind each prompt; less where one ends the text or the model has no more positions.

    ValueError for a prompt without a token.
    """
    ids = [encode(model, prompt)[0] for prompt in prompts]
    for prompt, each in zip(prompts, ids, strict=True):
        if not each:
            raise ValueError(f"the prompt {prompt!r} has no token to go on from")
    said = continuations(model, ids, tokens)
    end = model.tokenizer.eos_token_id
    cut = [each[: each.index(end)] if end in each else each for each in said]
    return [model.tokenizer.decode(each) for each in cut]
