"""`ke.trace(kind="knockout")` equals the plain loop that masks edges by hooks, for every family."""

from __future__ import annotations

import json

import numpy as np
import pytest

import knowedit_ext as ke

from ..support.families import FAMILIES, LAYERS, tiny_model
from ..support.oracle import plain_knockout

FACTS = [
    ke.Fact("w5 w6 {} w9 w10 w11", "w3 w7"),
    ke.Fact("{} w13 w2", "w8 w12 w4"),
    ke.Fact("w20 w21 w22 w23 w24 w25 w26 w27 {}", "w28"),  # subject and last token are one
]
IDS = [[5, 6, 3, 7, 9, 10, 11], [8, 12, 4, 13, 2], [20, 21, 22, 23, 24, 25, 26, 27, 28]]
GROUPS = [
    {"subject": (2, 3), "rest": (0, 1, 4, 5), "last": (6,)},
    {"subject": (0, 1, 2), "rest": (3,), "last": (4,)},
    {"subject": (8,), "rest": tuple(range(8)), "last": (8,)},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    model = tiny_model(family)
    for window in (1, 2, 3):
        for traced, ids, groups in zip(ke.trace(model, FACTS, "knockout", window=window), IDS, GROUPS, strict=True):
            assert traced.groups == groups and traced.window == window
            for name, unseen in groups.items():
                want = np.exp(plain_knockout(model.hf, ids, traced.answer_ids, unseen, window))
                np.testing.assert_allclose(traced.scores[name], want, atol=1e-5, rtol=0)
    # Cut edges matter, else the comparison would say nothing.
    assert max(np.abs(change).max() for change in traced.change.values()) > 0.01


def test_groups_answers_and_scores() -> None:
    model, fact, ids = tiny_model("llama"), FACTS[0], IDS[0]
    groups = {"first": [0], "far": [1, 3, 5], "answer too": [2, 6]}
    traced = ke.trace(model, fact, "knockout", window=2, groups=groups, answer_tokens=3, score="logprob", max_rows=7)
    assert len(traced.answer_ids) == 3
    for name, unseen in groups.items():
        want = plain_knockout(model.hf, ids, traced.answer_ids, unseen, 2)
        np.testing.assert_allclose(traced.scores[name], want, atol=1e-4, rtol=0)
        np.testing.assert_allclose(traced.change[name], want - traced.clean_score, atol=1e-4)
    whole = ke.trace(model, fact, "knockout", window=2, groups=groups, answer_tokens=3, score="logprob")
    for name in groups:
        np.testing.assert_allclose(traced.scores[name], whole.scores[name], atol=1e-5)


def test_average_and_figure(tmp_path) -> None:
    model = tiny_model("gpt2")
    traces = ke.trace(model, FACTS, "knockout", window=2)
    effects = ke.knockout_effects(traces)
    for name, interval in effects.items():
        change = np.stack([t.scores[name] / t.clean_score - 1 for t in traces])
        np.testing.assert_allclose(interval.mean, change.mean(0), rtol=1e-5)
        np.testing.assert_allclose(interval.half_width, 1.96 * change.std(0, ddof=1) / 3**0.5, rtol=1e-4)
        assert interval.n == 3 and len(interval.mean) == LAYERS
    ke.plot_knockouts(traces, tmp_path / "all.png")
    traces[0].plot(tmp_path / "one.pdf")
    with pytest.raises(ValueError, match="differ in window"):
        ke.knockout_effects([traces[0], ke.trace(model, FACTS[0], "knockout", window=1)])


def test_saved_and_loaded(tmp_path) -> None:
    traced = ke.trace(tiny_model("gpt2"), FACTS[0], "knockout")
    path = tmp_path / "k.json"
    traced.save(path)
    again = ke.KnockoutTrace.load(path)
    assert again.groups == traced.groups and again.tokens == traced.tokens and again.answer_ids == traced.answer_ids
    for name in traced.scores:
        np.testing.assert_array_equal(again.scores[name], traced.scores[name])
    good = json.loads(path.read_text())
    for key, wrong in (("scores", [1]), ("groups", {"subject": [0.5]}), ("window", "x"), ("scores", {"other": [1.0]})):
        path.write_text(json.dumps(good | {key: wrong}))
        with pytest.raises(ValueError, match="k.json"):
            ke.KnockoutTrace.load(path)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"groups": {"all": range(7)}}, "would see nothing"),
        ({"groups": {"out": [7]}}, "positions 0..6"),
        ({"groups": {"none": []}}, "positions 0..6"),
        ({"groups": {"before": [-1]}}, "positions 0..6"),
        ({"noise": 0.1}, "noise would do nothing"),
        ({"sever": "mlp"}, "sever would do nothing"),
        ({"window": LAYERS}, "window is 4"),
    ],
)
def test_bad_input(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ke.trace(tiny_model("gpt2"), FACTS[0], "knockout", **given)


def test_groups_are_a_knockouts() -> None:
    with pytest.raises(ValueError, match="kind='knockout'"):
        ke.trace(tiny_model("gpt2"), FACTS[0], "state", groups={"subject": [2]})


def test_a_token_alone_in_its_sliding_window() -> None:
    """Not seeing itself, nor what its window reaches: it would see nothing, whatever lies further left."""
    with pytest.raises(ValueError, match="sliding window of 3"):
        ke.trace(tiny_model("mistral"), FACTS[0], "knockout", groups={"near": [4, 5, 6]}, window=1)
