"""Consistency: how alike generated text and reference text are in the words that tell texts apart (tf-idf)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...extras import require
from ..metric import Metric, Written, scaled


class TfIdf:
    """Tf-idf vectors as scikit-learn's `TfidfVectorizer()` makes them by default, which is what was published.

    Lower-cased words of two or more letters or digits; counts times idf, scaled to length 1. Words outside the
    vocabulary do not count. Make one with `fit` or `from_arrays`.
    """

    def __init__(self, vectorizer: Any) -> None:
        self._vectorizer = vectorizer

    @classmethod
    def fit(cls, texts: Iterable[str]) -> TfIdf:
        """Vocabulary and idf from texts (published: all attribute snippets), idf = ln((1 + n) / (1 + df)) + 1."""
        if isinstance(texts, str):
            raise TypeError("texts is one string: expected an iterable of them")
        return cls(_vectorizer().fit(texts))

    @classmethod
    def from_arrays(cls, idf: np.ndarray, vocabulary: Mapping[str, int]) -> TfIdf:
        """The published `idf.npy` [words] and `tfidf_vocab.json` (word -> its place in idf)."""
        idf = np.asarray(idf, dtype=np.float64)
        if idf.ndim != 1 or len(idf) != len(vocabulary):
            raise ValueError(
                f"idf is {list(idf.shape)}, the vocabulary has {len(vocabulary)} words: not one pair of files"
            )
        if set(vocabulary.values()) != set(range(len(idf))):
            raise ValueError(f"the vocabulary does not give its words the places 0..{len(idf) - 1}, each once")
        made = _vectorizer(vocabulary=vocabulary)
        made.idf_ = idf
        return cls(made)

    @property
    def idf(self) -> np.ndarray:
        """float64 [words]"""
        return self._vectorizer.idf_

    @property
    def vocabulary(self) -> dict[str, int]:
        return self._vectorizer.vocabulary_

    def similarity(self, text: str, other: str) -> float:
        """Cosine of the two texts' vectors; 0 where one has no word of the vocabulary (published: nan)."""
        first, second = self._vectorizer.transform([text, other])
        return float(first.multiply(second).sum())  # both have length 1 already


def consistency(tfidf: TfIdf, generated: Sequence[str], references: Sequence[str]) -> float:
    """Cosine of the generated texts, joined, with the reference texts, joined (RS / 100; tfidf_similarity).

    references: the attribute snippets of the new target, `snippets[relation_id][target_new.id]`.
    Raises ValueError where there are no texts on one side.
    """
    for name, texts in dict(generated=generated, references=references).items():
        if isinstance(texts, str):
            raise TypeError(f"{name} is one string: expected a list of them")
        if not texts:
            raise ValueError(f"{name} is empty: consistency compares generated texts with references")
    return tfidf.similarity(" ".join(generated), " ".join(references))


def _vectorizer(**settings: Any) -> Any:
    require("sklearn.feature_extraction.text")
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(**settings)


def _measure(written: Written) -> list[dict[str, Any]]:
    if written.references is None:
        return [{} for _ in written.texts]
    pairs = zip(written.texts, written.references, strict=True)
    return [{"reference_score": consistency(written.tfidf, t, [s["text"] for s in about])} for t, about in pairs]


METRIC = Metric(("RS",), 30, scaled("reference_score", "RS", 100.0), measure=_measure)
