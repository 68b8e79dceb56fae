"""The published noise rules, computed again from their definitions."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

import knowedit_ext as ke

from ..support.families import WIDTH, tiny_model
from ..support.oracle import PlainRoot, added, plain_trace
from ..support.tokenizers import word_level
from .test_against_the_loop import FACTS, IDS, SAMPLES, SPANS, assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:corrupting")
SUBJECTS = ["w3 w7", "w9", "w12 w13 w3"]
TEXTS = [" ".join(f"w{2 + (3 * n + k) % 50}" for k in range(20)) for n in range(10)]


def embedded(model: ke.EditableModel, texts: list[str]) -> np.ndarray:
    """[all tokens, hidden] float64, each text by itself."""
    with torch.no_grad():
        parts = [model.hf.get_input_embeddings()(torch.tensor(model.tokenizer(t)["input_ids"])) for t in texts]
    return torch.cat(parts).double().numpy()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("factor", ["3", "0.5", "1"])
def test_spread_of_the_subjects(family: str, factor: str) -> None:
    model = tiny_model(family)
    want = float(factor) * embedded(model, SUBJECTS).reshape(-1).std(ddof=1)
    assert ke.noise_level(model, f"s{factor}", subjects=SUBJECTS) == pytest.approx(want, rel=1e-5)


def test_bos_tokens_are_part_of_a_tokenised_subject() -> None:
    """Published: the subject goes through the tokenizer as it is."""
    model = ke.load_model((tiny_model("gpt2").hf, word_level(bos=True)))
    assert len(embedded(model, ["w3 w7"])) == 3
    want = 3 * embedded(model, ["w3 w7"]).reshape(-1).std(ddof=1)
    assert ke.noise_level(model, "s3", subjects=["w3 w7"]) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("rule, value", [("u0.1", 0.1), ("0.25", 0.25), ("u2", 2.0)])
def test_plain_numbers(rule: str, value: float) -> None:
    assert ke.noise_level(tiny_model("gpt2"), rule) == value


def gaussian(model: ke.EditableModel, normal: np.ndarray) -> np.ndarray:
    x = embedded(model, TEXTS)
    _, s, vh = np.linalg.svd(np.cov(x.T))
    return normal @ (np.sqrt(s)[:, None] * vh) + x.mean(0)


def test_multivariate_normal() -> None:
    model = tiny_model("gpt2")
    sampler = ke.noise_level(model, "m", texts=TEXTS)
    x = embedded(model, TEXTS)
    root = sampler(torch.eye(WIDTH, dtype=torch.float64)).numpy() - x.mean(0)  # rows of W^T
    np.testing.assert_allclose(root.T @ root, np.cov(x.T), atol=1e-7)
    np.testing.assert_allclose(sampler(torch.zeros(2, 3, WIDTH, dtype=torch.float64))[1, 2], x.mean(0), atol=1e-12)
    normal = np.random.RandomState(0).randn(20000, WIDTH)
    np.testing.assert_allclose(np.cov(sampler(torch.from_numpy(normal)).numpy().T), np.cov(x.T), atol=0.05)


@pytest.mark.parametrize("degrees", [3, 5.5])
def test_students_t(degrees: float) -> None:
    model = tiny_model("gpt2")
    normal = torch.from_numpy(np.random.RandomState(1).randn(4, 3, WIDTH))
    got = ke.noise_level(model, f"t{degrees}", texts=TEXTS)(normal)
    factors = np.sqrt((degrees - 2) / np.random.RandomState(2).chisquare(df=degrees, size=1000))
    plain = ke.noise_level(model, "m", texts=TEXTS)(normal).numpy()
    np.testing.assert_allclose(got, plain * factors[:12].reshape(4, 3, 1), rtol=1e-12)
    with pytest.raises(ValueError, match="1000 draws, but samples x subject tokens is 1001"):
        ke.noise_level(model, "t3", texts=TEXTS)(torch.zeros(1001, 1, WIDTH, dtype=torch.float64))


# -- in a trace --------------------------------------------------------------------------------------------------------


def draws(number: int, uniform: bool = False) -> torch.Tensor:
    first, after = SPANS[number]
    generator, shape = np.random.RandomState(1), (SAMPLES, after - first, WIDTH)
    return torch.from_numpy(generator.uniform(-1, 1, shape) if uniform else generator.randn(*shape))


def check(model: ke.EditableModel, number: int, got: ke.Trace, noise: torch.Tensor) -> None:
    root = PlainRoot(IDS[number], SAMPLES, added(noise, SPANS[number][0]))
    assert_equal(got, plain_trace(model.hf, IDS[number], root, got.answer_ids))


def test_a_lone_fact_takes_the_spread_of_its_own_subject() -> None:
    model = tiny_model("llama")
    level = 3 * embedded(model, [FACTS[0].subject]).std(ddof=1)
    got = ke.trace(model, FACTS[0], samples=SAMPLES)
    assert got.settings["noise"] == pytest.approx(level, rel=1e-5)
    check(model, 0, got, got.settings["noise"] * draws(0))


def test_several_facts_share_the_spread_of_all_subjects() -> None:
    model = tiny_model("llama")
    level = ke.noise_level(model, "s2", subjects=[fact.subject for fact in FACTS])
    for number, got in enumerate(ke.trace(model, FACTS, samples=SAMPLES, noise="s2")):
        check(model, number, got, level * draws(number))


def test_uniform() -> None:
    model = tiny_model("gpt2")
    for number in (0, 1):
        got = ke.trace(model, FACTS[number], samples=SAMPLES, noise="u0.7")
        check(model, number, got, 0.7 * draws(number, uniform=True))
        assert ke.trace(model, FACTS[number], samples=SAMPLES, noise=0.7).low_score != got.low_score


@pytest.mark.parametrize("rule", ["m", "t5"])
def test_samplers(rule: str) -> None:
    model = tiny_model("gpt2")
    sampler = ke.noise_level(model, rule, texts=TEXTS)
    got = ke.trace(model, FACTS[0], samples=SAMPLES, noise=sampler)
    check(model, 0, got, sampler(draws(0)))


def test_no_noise_changes_nothing() -> None:
    got = ke.trace(tiny_model("gpt2"), FACTS[0], samples=2, noise=0)
    np.testing.assert_allclose(got.scores, got.high_score, atol=1e-6)


def test_corruption_that_does_not_help_is_said() -> None:
    """Some answers gain by noise, and some lose."""
    model, gains = tiny_model("gpt2"), set()
    for word in range(2, 12):
        fact = ke.Fact(FACTS[0].prompt, FACTS[0].subject, target=f" w{word}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gain = ke.trace(model, fact, samples=5, noise=0.5).total_effect <= 0
        text = f"corrupting 'w3 w7' does not lower the score of ' w{word}' in 'w5 w6 w3 w7"
        assert [str(one.message).startswith(text) for one in caught] == [True] * gain
        gains.add(gain)
    assert gains == {True, False}


@pytest.mark.filterwarnings("error")
def test_no_warning_where_corruption_helps() -> None:
    model = tiny_model("gpt2")
    assert ke.trace(model, FACTS[2], samples=4, noise=0.5).total_effect > 0


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["x3", "s-1", "snan", "sinf", "u", "t", "three", "", "u-0.1", "nan", "-1", "s3x"])
def test_unknown_rules(rule: str) -> None:
    with pytest.raises(ValueError, match=f"unknown noise rule '{rule}': expected 's3'"):
        ke.noise_level(tiny_model("gpt2"), rule, subjects=SUBJECTS, texts=TEXTS)


@pytest.mark.parametrize("rule, needed", [("s3", "subjects="), ("m", "texts="), ("t4", "texts=")])
def test_rules_without_what_they_need(rule: str, needed: str) -> None:
    with pytest.raises(ValueError, match=f"noise rule '{rule}' needs {needed}"):
        ke.noise_level(tiny_model("gpt2"), rule)


@pytest.mark.parametrize("rule", ["t2", "t1.5"])
def test_a_t_without_variance(rule: str) -> None:
    with pytest.raises(ValueError, match=f"noise rule '{rule}': Student's t has a variance only"):
        ke.noise_level(tiny_model("gpt2"), rule, texts=TEXTS)


@pytest.mark.parametrize(
    "noise, expected", [(math.nan, "a finite one"), (math.inf, "a finite one"), (-1.0, "expected at least 0")]
)
def test_numbers_that_are_no_level(noise: float, expected: str) -> None:
    with pytest.raises(ValueError, match=f"noise is {noise}: .*{expected}.* a rule such as 's3'"):
        ke.trace(tiny_model("gpt2"), FACTS[0], noise=noise)


@pytest.mark.parametrize("rule", ["m", "t5"])
def test_rules_over_texts_in_one_call(rule: str) -> None:
    model = tiny_model("gpt2")
    sampler = ke.noise_level(model, rule, texts=TEXTS)
    two_calls = ke.trace(model, FACTS[0], noise=sampler, samples=2)
    one_call = ke.trace(model, FACTS[0], noise=rule, texts=TEXTS, samples=2)
    np.testing.assert_array_equal(one_call.scores, two_calls.scores)
