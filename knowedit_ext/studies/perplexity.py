"""General ability: the perplexity of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..evaluation.metrics.essence import perplexity
from ..model.load import EditableModel
from ..model.tokens import encode_all

STRETCH = 128  # tokens of a text that are read together


def text_perplexity(model: EditableModel, texts: Sequence[str], max_rows: int | None = None) -> float:
    """exp of the mean negative log-probability of all tokens that are predicted, all but a text's first; of each text
    the first 128 tokens count."""
    read = predicted(model, texts)
    values = perplexity(model, [text for text, _ in read], max_length=_length(model), max_rows=max_rows)
    total = sum(math.log(value) * count for value, (_, count) in zip(values, read, strict=True))
    return math.exp(total / sum(count for _, count in read))


def predicted(model: EditableModel, texts: Sequence[str]) -> list[tuple[str, int]]:
    """The texts with tokens to predict, and how many; ValueError where there is none."""
    counts = [len(ids) - 1 for ids in encode_all(model, texts, _length(model))]
    read = [(text, count) for text, count in zip(texts, counts, strict=True) if count > 0]
    if not read:
        raise ValueError("no text has two tokens: there is nothing to predict in it")
    return read


def _length(model: EditableModel) -> int:
    most = model.modules.max_positions
    return STRETCH if most is None else min(STRETCH, most)
