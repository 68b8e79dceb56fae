"""Fluency: the entropy of a text's word pairs and triples. Text that repeats itself has little."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ...extras import require
from ..metric import Metric, Written, scaled

WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # by the n of the n-grams; compute_n_gram_entropy, as published


def ngram_entropy(texts: Sequence[str], sentences: str = "none") -> float:
    """Mean over texts of (2/3 H2 + 4/3 H3) / 2, Hn the entropy in bits of the text's n-grams of words (GE / 100).

    A text with fewer words than n has Hn = 0. The published code splits text into sentences before words, by a model
    that nltk downloads.

    sentences: "none" takes nltk's word tokeniser to the whole text and needs no download. It differs in one thing: the
        tokeniser parts a period from its word at the end of what it is given only, so periods inside the text stay
        with the word in front of them ("sat." is one word). "punkt" splits sentences first, as published.

    Raises ValueError without texts, `MissingExtraError` without nltk, LookupError where "punkt" was never downloaded.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string: expected a list of them")
    if not texts:
        raise ValueError("no texts: fluency is a mean over texts")
    return sum(_entropy(words(text, sentences)) for text in texts) / len(texts)


def words(text: str, sentences: str = "none") -> list[str]:
    """Words and punctuation by nltk's tokeniser; `sentences` as for `ngram_entropy`."""
    if sentences not in ("none", "punkt"):
        raise ValueError(f"unknown sentences '{sentences}': expected 'none' or 'punkt'")
    require("nltk.tokenize")
    from nltk.tokenize import word_tokenize

    try:
        return word_tokenize(text, preserve_line=sentences == "none")
    except LookupError as error:
        raise LookupError(
            "sentences='punkt' needs nltk's sentence model: python -m nltk.downloader punkt_tab; "
            "sentences='none' does without"
        ) from error


def _entropy(words: Sequence[str]) -> float:
    return sum(weight * _bits(words, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def _bits(words: Sequence[str], n: int) -> float:
    """Entropy of the n-grams' distribution, in bits."""
    counts = Counter(zip(*(words[first:] for first in range(n)), strict=False))
    total = counts.total()
    return sum(-count / total * math.log2(count / total) for count in counts.values())


def _measure(written: Written) -> list[dict[str, Any]]:
    return [{"ngram_entropy": ngram_entropy(texts), "text": texts} for texts in written.texts]


METRIC = Metric(("GE",), 20, scaled("ngram_entropy", "GE", 100.0), measure=_measure)
