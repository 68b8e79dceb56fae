"""Texts are made tokens while the batches before them are computed, and nothing else about a collection changes."""

from __future__ import annotations

import threading

import pytest
import torch
from moments.test_collect import texts
from support.families import tiny_model

import knowedit_ext as ke
from knowedit_ext.moments import collect
from knowedit_ext.moments.ahead import ahead


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(collect, "GROUP", 10)


def test_the_same_items_one_made_ahead():
    made, seen = [], []

    def items():
        for n in range(4):
            made.append(n)
            yield n

    for n in ahead(items()):
        seen.append(n)
        while len(made) < min(n + 2, 4):  # made by the other thread: this one is busy here
            pass
    assert seen == made == list(range(4))
    assert list(ahead(iter(()))) == []


def test_errors_come_in_their_turn_and_the_thread_ends():
    def items():
        yield 1
        raise ValueError("text 2 is a number")

    turns = ahead(items())
    assert next(turns) == 1
    with pytest.raises(ValueError, match="text 2 is a number"):
        next(turns)
    early = ahead(items())
    next(early)
    early.close()  # what comes next was never asked for
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())


def test_the_next_texts_are_encoded_while_these_are_computed(small_groups, monkeypatch):
    encoded, encode, step = [threading.Event() for _ in range(4)], collect.encode_all, collect._Pass._step

    def watched(model, some, most):
        ids = encode(model, some, most)
        assert threading.current_thread() is not threading.main_thread()
        next(event for event in encoded if not event.is_set()).set()
        return ids

    def held(self, number, batch):
        group = self.cursor.text // 10
        assert group == 3 or encoded[group + 1].wait(20)
        step(self, number, batch)

    monkeypatch.setattr(collect, "encode_all", watched)
    monkeypatch.setattr(collect._Pass, "_step", held)
    ke.collect_moments(tiny_model("gpt2"), texts(40), [0], batch_tokens=64, progress=False)


@pytest.mark.parametrize("most", [None, 55, 250])
def test_the_same_bits_as_one_behind_the_other(small_groups, monkeypatch, most):
    call = lambda: ke.collect_moments(  # noqa: E731
        tiny_model("gpt2"), texts(40), [0, 2], most, batch_tokens=64, progress=False
    )
    got = call()
    monkeypatch.setattr(collect, "ahead", lambda items: (item for item in items))
    want = call()
    for layer in (0, 2):
        assert torch.equal(got[layer].mean, want[layer].mean) and got[layer].count == want[layer].count


def test_a_text_that_is_none_is_told_of_where_it_counts(small_groups):
    model, some = tiny_model("gpt2"), [*texts(25), 7]
    assert ke.collect_moments(model, some, [0], 20, progress=False)[0].count == 20
    with pytest.raises(ValueError, match="text 25 is int"):
        ke.collect_moments(model, some, [0], progress=False)
