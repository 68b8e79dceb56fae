"""Bad input: an error that names the culprit, and a model that is as it was."""

from __future__ import annotations

import math

import pytest

import knowedit_ext as ke

from ..support.families import tiny_hf, tiny_model
from ..support.tokenizers import tokenizer
from ..support.unchanged import assert_unchanged, snapshot

GOOD = ke.Fact("w5 w6 {} w9 w10 w11", "w3 w7")
ANSWERED = ke.Fact(GOOD.prompt, GOOD.subject, target=" w20 w21")


@pytest.fixture
def model():
    """The shared tiny model, which must come out of each test as it went in."""
    before = snapshot(tiny_model("gpt2").hf)
    yield tiny_model("gpt2")
    assert_unchanged(before, tiny_model("gpt2").hf)


@pytest.mark.parametrize(
    "asked, message",
    [
        (dict(kind="head"), r"unknown kind 'head': expected one of 'state', 'mlp', 'attn'"),
        (dict(kind=None), "kind is None: expected text"),
        (dict(window=0), "window is 0: expected .*at least 1"),
        (dict(window=-3), "window is -3"),
        (dict(window=2.5), "window is 2.5"),
        (dict(window=True), "window is True"),
        (dict(window="3"), "window is '3'"),
        (dict(kind="mlp", window=4), "window is 4, the model has 4 layers.* at most 3 .default for this model: 2"),
        (dict(kind="attn", window=100), "window is 100"),
        (dict(samples=0), "samples is 0"),
        (dict(samples="10"), "samples is '10'"),
        (dict(answer_tokens=0), "answer_tokens is 0"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=1.5), "seed is 1.5"),
        (dict(seed=2**32), "seed is 4294967296"),
        (dict(noise=math.nan), "noise is nan"),
        (dict(noise="s"), "noise rule 's'"),
        (dict(noise="loud"), "unknown noise rule 'loud'"),
        (dict(noise=None), "noise is None"),
        (dict(sever="layer"), "unknown sever 'layer'"),
        (dict(compat="rome"), "unknown compat 'rome'"),
        (dict(score="loss"), "unknown score 'loss'"),
        (dict(score="logit_difference"), "against="),
        (dict(against=" w4"), "against="),
        (dict(score="logit_difference", against=" w4 w5"), "' w4 w5' after .* has 2"),
        (dict(tokens="last"), "tokens='last': expected 'subject_last' or token numbers 0..6"),
        (dict(tokens=[7]), r"tokens=\(7,\)"),
        (dict(tokens=[-1]), r"tokens=\(-1,\)"),
        (dict(tokens=[]), r"tokens=\(\)"),
        (dict(tokens=[1.5]), r"tokens is \[1.5\]: expected text or a list of a whole number"),
        (dict(max_rows=0), "max_rows is 0"),
        (dict(corrupt_with="w4"), "corrupt_with 'w4' has 1 tokens in '.*', subject 'w3 w7' has 2"),
        (dict(corrupt_with="w4 w5 w6"), "corrupt_with 'w4 w5 w6' has 3 tokens"),
        (dict(corrupt_with="w4 w5", replace=True), "with corrupt_with there is no noise"),
        (dict(corrupt_with=" "), "subject of prompt .* is empty"),
    ],
)
def test_bad_arguments(model, asked, message) -> None:
    with pytest.raises(ValueError, match=message):
        ke.trace(model, GOOD, **({"samples": 2, "noise": 0.5} | asked))


@pytest.mark.parametrize(
    "fact, message",
    [
        (ke.Fact("{}", "w3"), "prompt 'w3' is a single token"),
        (ke.Fact("{}" + " w4" * 64, "w3"), "takes 65 tokens, more than the model's 64 positions"),
        (ke.Fact("{}" + " w4" * 62, "w3", target=" w4" * 3), "more than the model's 64 positions"),
    ],
)
def test_bad_facts(model, fact, message) -> None:
    for facts in (fact, [GOOD, fact]):
        with pytest.raises(ValueError, match=message):
            ke.trace(model, facts, samples=2, noise=0.5)


def test_an_answer_that_runs_out_of_positions(model) -> None:
    with pytest.raises(ValueError, match="64 positions"):
        ke.trace(model, ke.Fact("{}" + " w4" * 62, "w3"), answer_tokens=4, samples=2, noise=0.5)


def test_no_facts_at_all(model) -> None:
    with pytest.raises(ValueError, match="no facts"):
        ke.trace(model, [])


def test_two_answers_are_compared_by_one_token(model) -> None:
    with pytest.raises(ValueError, match="the answer has 2"):
        ke.trace(model, ANSWERED, score="logit_difference", against=" w4", noise=0.5)


def test_a_target_that_merges() -> None:
    model = ke.load_model((tiny_hf("gpt2", vocab_size=400), tokenizer("byte_bpe")))
    with pytest.raises(ValueError, match="target 'pet' merges with the last token of prompt 'Miles plays the trum'"):
        ke.trace(model, ke.Fact("{} plays the trum", "Miles", target="pet", space=False), noise=0.5)


def test_what_is_no_fact(model) -> None:
    with pytest.raises(TypeError, match="Fact"):
        ke.trace(model, "w3 w4 w5", noise=0.5)


@pytest.mark.parametrize(
    "sampler, message",
    [
        (lambda z: z[..., :3], "expected a float tensor of that shape"),
        (lambda z: z.mean(), "expected a float tensor of that shape"),
        (lambda z: z.long(), "gives torch.int64"),
        (lambda z: z.numpy(), "gives a ndarray"),
        (lambda z: None, "gives a NoneType"),
        (lambda z: z * float("nan"), "gives NaN or infinite numbers"),
    ],
)
def test_samplers_that_give_no_noise(model, sampler, message: str) -> None:
    with pytest.raises(ValueError, match=f"the sampler .*{message}"):
        ke.trace(model, ke.Fact("{} w4 w5", "w3"), samples=2, noise=sampler)
