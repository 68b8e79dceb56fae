"""Fluency: the published formula, nltk's words, and what happens without nltk or its sentence model."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest

from knowedit_ext.evaluation.metrics.fluency import ngram_entropy, words

nltk = pytest.importorskip("nltk")


def published(tokens: list[str]) -> float:
    """compute_n_gram_entropy, from a text's words."""
    entropies = []
    for n in (2, 3):
        counts = np.array(list(Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)).values()))
        p = counts / counts.sum()
        entropies.append(np.sum(-p * np.log(p) / np.log(2)))
    return float(np.mean(np.array(entropies) * np.array([2 / 3, 4 / 3])))


def test_by_hand() -> None:
    assert ngram_entropy(["a b c d e"]) == pytest.approx((2 / 3 * 2 + 4 / 3 * np.log2(3)) / 2)
    assert ngram_entropy(["a b a b a"]) == pytest.approx((2 / 3 * 1 + 4 / 3 * (np.log2(3) - 2 / 3)) / 2)
    assert ngram_entropy(["no no no no"]) == 0
    assert ngram_entropy(["a b c d e", "no no no no"]) == pytest.approx(ngram_entropy(["a b c d e"]) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_against_the_published_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = [f"w{int(i)}" for i in rng.integers(0, 6, size=3 + 17 * seed)]
    assert ngram_entropy([" ".join(tokens)]) == pytest.approx(published(tokens), rel=1e-12)


@pytest.mark.parametrize("text", ["", "one", "one two"])
def test_short_texts_have_none(text: str) -> None:
    assert ngram_entropy([text]) == 0


def test_words_are_nltks() -> None:
    text = "The cat's asleep. \"Don't wake it,\" said Dr. Who, 3.5 times."
    assert words(text) == nltk.tokenize.NLTKWordTokenizer().tokenize(text)
    assert words(text)[:4] == ["The", "cat", "'s", "asleep."]


def test_sentences_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.tokenize, "sent_tokenize", lambda text, language: text.split("|"))
    assert words("The cat sat.|It sat. still.", "punkt") == ["The", "cat", "sat", ".", "It", "sat.", "still", "."]
    assert words("The cat sat. It sat.", "none") == ["The", "cat", "sat.", "It", "sat", "."]


def test_a_missing_sentence_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    assert ngram_entropy(["a b c. d e."]) > 0
    with pytest.raises(LookupError, match="punkt_tab"):
        ngram_entropy(["a b c. d e."], sentences="punkt")


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no texts"):
        ngram_entropy([])
    with pytest.raises(TypeError, match="one string"):
        ngram_entropy("a b c")
    with pytest.raises(ValueError, match="unknown sentences 'some'"):
        ngram_entropy(["a b c"], sentences="some")
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    with pytest.raises(ImportError, match="pip install nltk"):
        ngram_entropy(["a b c"])
