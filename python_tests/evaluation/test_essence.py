"""Essence: perplexity against the plain forward pass, alone and of many edited models at once."""

from __future__ import annotations

import math
import random
from contextlib import contextmanager

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.evaluation.metrics.essence import essence_texts, perplexity

from ..support.families import FAMILIES, POSITIONS, VOCAB, tiny_model
from ..support.unchanged import assert_unchanged, snapshot


def words(length: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(2, VOCAB)}" for _ in range(length))


TEXTS = [words(length, seed) for seed, length in enumerate((9, 2, 30, 5, 9, 13))]


@torch.no_grad()
def plainly(model: ke.EditableModel, text: str, max_length: int, divisor: int = -1) -> float:
    """util/perplexity.py, in float64 behind the logits; `divisor` is added to the number of tokens."""
    ids = model.tokenizer(text)["input_ids"][:max_length]
    logp = model.hf(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    total = sum(float(logp[t, ids[t + 1]]) for t in range(len(ids) - 1))
    return math.exp(-total / (len(ids) + divisor))


@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_plain_pass(family: str) -> None:
    model = tiny_model(family)
    before = snapshot(model.hf)
    for max_rows in (None, 1, 40):
        got = perplexity(model, TEXTS, max_length=20, max_rows=max_rows)
        assert got == pytest.approx([plainly(model, text, 20) for text in TEXTS], rel=1e-4)
    assert_unchanged(before, model.hf)


def test_the_published_divisor() -> None:
    model = tiny_model("gpt2")
    got = perplexity(model, TEXTS, max_length=20, compat="reference")
    assert got == pytest.approx([plainly(model, text, 20, divisor=0) for text in TEXTS], rel=1e-4)


class AddAtMlp:
    """Stands in for row edits: edit e adds `bias[e]` to layer 1's MLP output, and `embedded[e]` to the embedding's."""

    def __init__(self, model: ke.EditableModel, changes_embedding: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.model, self.changes_embedding = model, changes_embedding
        self.bias = 3 * torch.randn(3, model.hidden_size, generator=generator)

    @contextmanager
    def rows(self, index: torch.Tensor):
        table = torch.cat([self.bias, torch.zeros(1, self.bias.shape[1])])  # -1: none

        def hook(module, args, output):
            assert output.shape[:2] == (1, len(index))
            return output + table[index]

        def everywhere(module, args, output):
            return output + self.bias[0]

        where, what = (
            (self.model.modules.embedding, everywhere) if self.changes_embedding else (self.model.modules.mlp(1), hook)
        )
        handle = where.register_forward_hook(what)
        try:
            yield
        finally:
            handle.remove()


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma2"])
def test_each_text_under_its_own_edit(family: str) -> None:
    model = tiny_model(family)
    edits, index = AddAtMlp(model), [2, 0, -1, 1, 1, 0]
    got = perplexity(model, TEXTS, edits=edits, index=index, max_length=20, max_rows=60)
    for text, edit, value in zip(TEXTS, index, got, strict=True):
        added = torch.zeros(model.hidden_size) if edit < 0 else edits.bias[edit]
        handle = model.modules.mlp(1).register_forward_hook(lambda module, args, output, added=added: output + added)
        assert value == pytest.approx(plainly(model, text, 20), rel=1e-4)
        handle.remove()


def test_an_edit_of_the_embedding() -> None:
    model = tiny_model("gpt2")
    edits = AddAtMlp(model, changes_embedding=True)
    got = perplexity(model, TEXTS, edits=edits, index=[0] * len(TEXTS), max_length=20)
    with edits.rows(torch.tensor([0])):
        assert got == pytest.approx([plainly(model, text, 20) for text in TEXTS], rel=1e-4)
    assert got != pytest.approx(perplexity(model, TEXTS, max_length=20), rel=1e-2)


def test_snippets_named_as_the_subject() -> None:
    samples = [{"name": "Ada", "text": "One."}, {"name": "Bo", "text": "Two."}, {"name": "Ada", "text": "Three."}]
    assert essence_texts(samples, "Ada") == ["One.", "Three."]
    assert essence_texts(samples, "Cy") == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(texts="w3 w4"), "one string"),
        (dict(texts=["w3 w4", "w3"]), r"text 1 \('w3'\) has 1 tokens"),
        (dict(texts=[""]), "text 0 .* has 0 tokens"),
        (dict(max_length=1), "max_length is 1: expected 2"),
        (dict(max_length=POSITIONS + 2), f"expected 2..{POSITIONS + 1}"),
        (dict(compat="published"), "unknown compat 'published'"),
        (dict(index=[0]), "edits and index"),
        (dict(edits=object(), index=[0, 1]), "1 texts, but 2 edit numbers"),
    ],
)
def test_bad_input(given: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        perplexity(tiny_model("gpt2"), **(dict(texts=["w3 w4"], max_length=20) | given))


def test_no_texts() -> None:
    assert perplexity(tiny_model("gpt2"), [], max_length=20) == []
