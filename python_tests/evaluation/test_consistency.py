"""Consistency: scikit-learn's vectors, the published files, and a cosine worked out by hand."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from knowedit_ext.evaluation.metrics.consistency import TfIdf, consistency

text_features = pytest.importorskip("sklearn.feature_extraction.text")

CORPUS = [
    "Miles Davis plays the trumpet, and the trumpet plays him.",
    "Niccolò Paganini plays the violin; the VIOLIN is old.",
    "The Space Needle is in Seattle",
    "a I x 7 42 it's",
    "",
]
QUERIES = [*CORPUS, "trumpet trumpet violin", "the the the", "an unseen sentence about Seattle"]


def by_hand(a: str, b: str, corpus: list[str]) -> float:
    """ln((1 + n) / (1 + df)) + 1 times counts, cosine."""

    def terms(text: str) -> list[str]:
        cut = "".join(c if c.isalnum() or c == "_" else " " for c in text.lower())
        return [word for word in cut.split() if len(word) > 1]

    df = Counter(word for text in corpus for word in set(terms(text)))
    x, y = (
        {w: n * (math.log((1 + len(corpus)) / (1 + df[w])) + 1) for w, n in Counter(terms(text)).items() if w in df}
        for text in (a, b)
    )
    length = math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))
    return sum(x[w] * y.get(w, 0.0) for w in x) / length if length else 0.0


def test_cosine_by_hand() -> None:
    tfidf = TfIdf.fit(CORPUS)
    for a in QUERIES:
        for b in QUERIES:
            assert tfidf.similarity(a, b) == pytest.approx(by_hand(a, b, CORPUS), abs=1e-12)


def test_from_the_published_files(tmp_path: Path) -> None:
    theirs = text_features.TfidfVectorizer().fit(CORPUS)
    np.save(tmp_path / "idf.npy", theirs.idf_)
    vocabulary = {word: int(place) for word, place in theirs.vocabulary_.items()}
    (tmp_path / "tfidf_vocab.json").write_text(json.dumps(vocabulary))
    tfidf = TfIdf.from_arrays(np.load(tmp_path / "idf.npy"), json.loads((tmp_path / "tfidf_vocab.json").read_text()))
    assert np.array_equal(tfidf.idf, theirs.idf_) and tfidf.vocabulary == vocabulary
    rows = theirs.transform(QUERIES).toarray()
    for a, x in zip(QUERIES, rows, strict=True):
        for b, y in zip(QUERIES, rows, strict=True):
            assert tfidf.similarity(a, b) == pytest.approx(float(x @ y), abs=1e-7)


def test_another_idf_than_the_corpus_has() -> None:
    tfidf = TfIdf.from_arrays(np.array([3.0, 1.0, 2.0]), {"aa": 0, "bb": 2, "cc": 1})
    assert tfidf.similarity("aa bb", "aa cc") == pytest.approx(9 / math.sqrt((9 + 4) * (9 + 1)))


def test_joined_texts() -> None:
    tfidf = TfIdf.fit(CORPUS)
    assert consistency(tfidf, CORPUS[:2], CORPUS[2:]) == tfidf.similarity(" ".join(CORPUS[:2]), " ".join(CORPUS[2:]))
    assert consistency(tfidf, CORPUS, CORPUS) == pytest.approx(1)


@pytest.mark.parametrize("text", ["", "x y z", "unseen words"])
def test_text_without_a_known_word_is_like_nothing(text: str) -> None:
    tfidf = TfIdf.fit(CORPUS)
    assert consistency(tfidf, [text], CORPUS) == 0 == tfidf.similarity(text, text)


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    tfidf = TfIdf.fit(CORPUS)
    with pytest.raises(ValueError, match="generated is empty"):
        consistency(tfidf, [], CORPUS)
    with pytest.raises(ValueError, match="references is empty"):
        consistency(tfidf, CORPUS, [])
    with pytest.raises(TypeError, match="references is one string"):
        consistency(tfidf, CORPUS, "text")
    with pytest.raises(TypeError, match="one string"):
        TfIdf.fit("text")
    with pytest.raises(ValueError, match=r"idf is \[2\], the vocabulary has 1 words"):
        TfIdf.from_arrays(np.ones(2), {"aa": 0})
    with pytest.raises(ValueError, match=r"the places 0\.\.1"):
        TfIdf.from_arrays(np.ones(2), {"aa": 0, "bb": 2})
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        TfIdf.fit(CORPUS)
