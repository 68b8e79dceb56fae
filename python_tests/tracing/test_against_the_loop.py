"""`ke.trace` equals the plain hook loop for every family, kind, window, severed path and chunking."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import knowedit_ext as ke

from ..support.families import FAMILIES, LAYERS, POSITIONS, WIDTH, WINDOWED, tiny_hf, tiny_model
from ..support.oracle import Plain, PlainRoot, PlainTrace, added, normal, plain_trace
from ..support.tokenizers import word_level

pytestmark = pytest.mark.filterwarnings("ignore:corrupting")

SAMPLES, NOISE = 3, 0.5
FACTS = [
    ke.Fact("w5 w6 {} w9 w10 w11", "w3 w7"),
    ke.Fact("{} w13 w2", "w8 w12 w4"),  # at the start, so that the corrupted run has nothing to branch from
    ke.Fact("w20 w21 w22 w23 w24 w25 w26 w27 {}", "w28"),  # at the end, and longer
]
IDS = [[5, 6, 3, 7, 9, 10, 11], [8, 12, 4, 13, 2], [20, 21, 22, 23, 24, 25, 26, 27, 28]]
SPANS = [(2, 4), (0, 3), (8, 9)]
CASES = [  # kind, window, sever
    ("state", 10, None),
    ("mlp", 1, None),
    ("mlp", 2, None),
    ("mlp", 3, None),
    ("attn", 2, None),
    ("attn", 3, None),
    ("state", 10, "mlp"),
    ("state", 10, "attn"),
    ("mlp", 2, "attn"),
    ("mlp", 3, "mlp"),  # restored and severed at the same site: severed wins, as published
    ("attn", 3, "attn"),
]


def noisy(number: int, answer=(0,), seed: int = 1, samples: int = SAMPLES) -> PlainRoot:
    first, after = SPANS[number]
    change = added(NOISE * normal(seed, samples, after - first, WIDTH), first)
    return PlainRoot([*IDS[number], *answer[:-1]], samples, change)


def assert_equal(got: ke.Trace, want: PlainTrace, atol: float = 1e-5) -> None:
    samples, low = np.exp(want.samples), np.exp(want.low)
    np.testing.assert_allclose(got.sample_scores, samples, atol=atol, rtol=0)
    np.testing.assert_allclose(got.scores, samples.mean(0), atol=atol, rtol=0)
    np.testing.assert_allclose(got.low_samples, low, atol=atol, rtol=0)
    assert got.low_score == pytest.approx(low.mean(), abs=atol)
    assert got.high_score == pytest.approx(np.exp(want.high), abs=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    model, spread = tiny_model(family), 0.0
    for kind, window, sever in CASES:
        asked = dict(kind=kind, window=window, sever=sever, samples=SAMPLES, noise=NOISE)
        together = ke.trace(model, FACTS, **asked)
        chunked = ke.trace(model, FACTS, max_rows=60, **asked)
        for number, (got, part) in enumerate(zip(together, chunked, strict=True)):
            assert list(got.input_ids) == IDS[number] and got.subject_range == SPANS[number]
            want = plain_trace(model.hf, IDS[number], noisy(number), got.answer_ids, kind, window, sever)
            assert_equal(got, want)
            np.testing.assert_allclose(part.scores, got.scores, atol=1e-6, rtol=0)
            spread = max(spread, np.ptp(want.scores))
    assert spread > 0.01  # otherwise nothing was compared
    alone = ke.trace(model, FACTS[0], **asked)
    np.testing.assert_allclose(alone.scores, together[0].scores, atol=1e-6, rtol=0)


def first_scores(hf) -> np.ndarray:
    return ke.trace(ke.load_model((hf, word_level())), FACTS[0], samples=2, noise=NOISE).scores


@pytest.mark.parametrize("family", WINDOWED)
def test_sliding_windows_matter(family: str) -> None:
    """The tests' prompts are longer than the windows: without a window the numbers are others."""
    assert np.abs(first_scores(tiny_hf(family)) - first_scores(tiny_hf(family, sliding_window=POSITIONS))).max() > 1e-3


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_soft_caps_matter(cap: str) -> None:
    assert np.abs(first_scores(tiny_hf("gemma2")) - first_scores(tiny_hf("gemma2", **{cap: None}))).max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "gptj", "qwen3", "gemma2"])
def test_bfloat16(family: str) -> None:
    """Within twice the error of the plain loop in bfloat16, both against float32."""
    exact = tiny_model(family)
    model = ke.load_model((tiny_hf(family), word_level()), dtype="bfloat16")
    wide = ke.load_model((tiny_hf(family).bfloat16().float(), word_level()))  # the same weights
    got = ke.trace(model, FACTS[0], samples=SAMPLES, noise=NOISE)
    want = plain_trace(wide.hf, IDS[0], noisy(0), got.answer_ids).scores
    plain = plain_trace(model.hf, IDS[0], noisy(0), got.answer_ids).scores
    assert np.abs(got.scores - want).max() <= 2 * np.abs(plain - want).max() + 1e-3
    assert got.scores.dtype == np.float32 and exact.dtype == torch.float32


def test_float64_is_exact() -> None:
    model = ke.load_model((tiny_hf("llama").double(), word_level()))
    got = ke.trace(model, FACTS[0], kind="attn", window=3, samples=SAMPLES, noise=NOISE, score="logprob")
    want = plain_trace(model.hf, IDS[0], noisy(0), got.answer_ids, "attn", 3)
    np.testing.assert_allclose(got.sample_scores, want.samples, atol=1e-6, rtol=1e-6)  # kept in float32
    assert got.low_score == pytest.approx(want.low.mean(), abs=1e-11)
    assert got.high_score == pytest.approx(want.high, abs=1e-11)


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("kind, sever", [("state", None), ("mlp", "attn")])
def test_a_given_answer_of_several_tokens(family: str, kind: str, sever: str | None) -> None:
    model, answer = tiny_model(family), (30, 31, 32)
    fact = ke.Fact(FACTS[0].prompt, FACTS[0].subject, target=" w30 w31 w32")
    got = ke.trace(model, fact, kind=kind, window=3, sever=sever, samples=SAMPLES, noise=NOISE)
    assert got.answer_ids == answer and got.answer == " w30 w31 w32"
    assert_equal(got, plain_trace(model.hf, IDS[0], noisy(0, answer), answer, kind, 3, sever))
    logs = ke.trace(model, fact, kind=kind, window=3, sever=sever, samples=SAMPLES, noise=NOISE, score="logprob")
    want = plain_trace(model.hf, IDS[0], noisy(0, answer), answer, kind, 3, sever)
    np.testing.assert_allclose(logs.sample_scores, want.samples, atol=1e-4, rtol=1e-5)
    assert np.ptp(want.samples) > 0.01
    assert logs.high_score == pytest.approx(want.high, abs=1e-4)


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_the_models_own_answer(family: str) -> None:
    model, answer = tiny_model(family), []
    for _ in range(3):
        with torch.no_grad():
            answer.append(int(model.hf(torch.tensor([IDS[0] + answer])).logits[0, -1].argmax()))
    got = ke.trace(model, FACTS[0], samples=SAMPLES, noise=NOISE, answer_tokens=3)
    assert got.answer_ids == tuple(answer) and got.answer == model.tokenizer.decode(answer)
    assert_equal(got, plain_trace(model.hf, IDS[0], noisy(0, answer), answer))


def test_logit_difference() -> None:
    for family in ("gpt2", "gemma2"):  # the second caps its logits
        model = tiny_model(family)
        got = ke.trace(
            model, FACTS[0], samples=SAMPLES, noise=NOISE, score="logit_difference", against=" w40", answer_tokens=1
        )
        ours = plain_trace(model.hf, IDS[0], noisy(0), got.answer_ids)
        other = plain_trace(model.hf, IDS[0], noisy(0), (40,))
        np.testing.assert_allclose(got.sample_scores, ours.samples - other.samples, atol=2e-4, rtol=1e-5)
        with torch.no_grad():
            logits = model.hf(torch.tensor([IDS[0]])).logits[0, -1]
        assert got.high_score == pytest.approx(float(logits[got.answer_ids[0]] - logits[40]), abs=1e-4)


def test_expected_attribute() -> None:
    model = tiny_model("gpt2")
    answer = ke.trace(model, FACTS[0], samples=1, noise=NOISE).answer
    right, wrong, unasked = (
        ke.trace(model, ke.Fact(FACTS[0].prompt, FACTS[0].subject, attribute=a), samples=1, noise=NOISE)
        for a in (f" {answer} ", "w59", None)
    )
    assert right.correct_prediction and unasked.correct_prediction and not wrong.correct_prediction


# -- corruption --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("kind", ["state", "mlp"])
def test_replace(number: int, kind: str) -> None:
    model, (first, after) = tiny_model("llama"), SPANS[number]
    got = ke.trace(model, FACTS[number], kind=kind, window=2, samples=SAMPLES, noise=NOISE, replace=True)
    noise = NOISE * normal(1, SAMPLES, after - first, WIDTH)
    root = PlainRoot(IDS[number], SAMPLES, added(noise, first, replace=True))
    assert_equal(got, plain_trace(model.hf, IDS[number], root, got.answer_ids, kind, 2))
    published = ke.trace(
        model, FACTS[number], kind=kind, window=2, samples=SAMPLES, noise=NOISE, replace=True, compat="reference"
    )
    np.testing.assert_allclose(published.scores, got.scores, atol=1e-6, rtol=0)
    plain = plain_trace(model.hf, IDS[number], noisy(number), got.answer_ids)  # low_score: noise added all the same
    assert published.low_score == pytest.approx(np.exp(plain.low).mean(), abs=1e-5)


@pytest.mark.parametrize("sever", ["mlp", "attn"])
@pytest.mark.parametrize("number", range(3))
def test_published_severed_runs_use_two_draws(number: int, sever: str) -> None:
    model, (first, after) = tiny_model("gpt2"), SPANS[number]
    asked = dict(samples=SAMPLES, noise=NOISE, sever=sever)
    got = ke.trace(model, FACTS[number], compat="reference", **asked)
    generator = np.random.RandomState(1)
    draws = [NOISE * torch.from_numpy(generator.randn(SAMPLES, after - first, WIDTH)) for _ in range(2)]
    frozen, run = (PlainRoot(IDS[number], SAMPLES, added(draw, first)) for draw in draws)
    want = plain_trace(model.hf, IDS[number], run, got.answer_ids, sever=sever, frozen=frozen)
    np.testing.assert_allclose(got.sample_scores, np.exp(want.samples), atol=1e-5, rtol=0)
    first_draw = plain_trace(model.hf, IDS[number], frozen, got.answer_ids)
    assert got.low_score == pytest.approx(np.exp(first_draw.low).mean(), abs=1e-5)
    one_draw = ke.trace(model, FACTS[number], **asked)
    assert np.abs(one_draw.scores - got.scores).max() > 1e-4


@pytest.mark.parametrize(
    "number, other, ids", [(0, "w50 w51", [50, 51]), (1, "w8 w51 w9", [8, 51, 9]), (2, "w33", [33])]
)
def test_another_subject(number: int, other: str, ids: list[int]) -> None:
    model, (first, after) = tiny_model("qwen3"), SPANS[number]
    swapped = [*IDS[number][:first], *ids, *IDS[number][after:]]
    for kind, sever in (("state", None), ("attn", "mlp")):
        got = ke.trace(model, FACTS[number], kind=kind, window=2, sever=sever, corrupt_with=other)
        assert got.sample_scores.shape == (1, len(swapped), LAYERS) and list(got.input_ids) == IDS[number]
        with torch.no_grad():
            embedded = model.hf.get_input_embeddings()(torch.tensor([swapped]))
        root = PlainRoot(IDS[number], 1, lambda x, e=embedded: e)
        assert_equal(got, plain_trace(model.hf, IDS[number], root, got.answer_ids, kind, 2, sever))
        assert np.isnan(got.standard_error).all()


@pytest.mark.parametrize("seed", [1, 7])
def test_seeds(seed: int) -> None:
    model = tiny_model("gpt_neox")
    got = ke.trace(model, FACTS[0], samples=SAMPLES, noise=NOISE, seed=seed)
    assert_equal(got, plain_trace(model.hf, IDS[0], noisy(0, seed=seed), got.answer_ids))
    again = ke.trace(model, FACTS[0], samples=SAMPLES, noise=NOISE, seed=seed)
    np.testing.assert_array_equal(again.sample_scores, got.sample_scores)
    other = ke.trace(model, FACTS[0], samples=SAMPLES, noise=NOISE, seed=seed + 1)
    assert np.abs(other.scores - got.scores).max() > 1e-4


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(3))
def test_subject_last_and_chosen_tokens(number: int) -> None:
    model, last = tiny_model("phi3"), SPANS[number][1] - 1
    whole = ke.trace(model, FACTS[number], kind="mlp", window=2, samples=2, noise=NOISE)
    for tokens, rows in (("subject_last", [last]), ([0, last, last], sorted({0, last}))):
        got = ke.trace(model, FACTS[number], kind="mlp", window=2, samples=2, noise=NOISE, tokens=tokens)
        np.testing.assert_allclose(got.scores[rows], whole.scores[rows], atol=1e-6, rtol=0)
        rest = [t for t in range(len(IDS[number])) if t not in rows]
        assert np.isnan(got.scores[rest]).all() and np.isfinite(got.scores[rows]).all()


def test_known_cells_hold_their_known_value() -> None:
    """Left of the noise, and behind the last layer left of the last token, nothing can be restored."""
    model = tiny_model("gpt2")
    got = ke.trace(model, FACTS[0], samples=SAMPLES, noise=NOISE)
    np.testing.assert_allclose(got.scores[:2], got.low_score, atol=1e-7)
    np.testing.assert_allclose(got.scores[:-1, -1], got.low_score, atol=1e-7)
    assert got.scores[-1, -1] == pytest.approx(got.high_score, abs=1e-6)


def test_effects_and_standard_errors() -> None:
    got = ke.trace(tiny_model("gpt2"), FACTS[0], samples=5, noise=NOISE)
    assert got.sample_scores.shape == (5, 7, LAYERS) and got.low_samples.shape == (5,)
    np.testing.assert_allclose(got.scores, got.sample_scores.mean(0), atol=1e-7)
    np.testing.assert_allclose(got.indirect_effect, got.scores - got.low_score, atol=1e-7)
    assert got.total_effect == got.high_score - got.low_score
    error = got.sample_scores.astype(np.float64).std(0, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(got.standard_error, error, rtol=1e-4, atol=1e-7)
    assert got.tokens == ["w5", "w6", "w3", "w7", "w9", "w10", "w11"]
    assert Plain(tiny_model("gpt2").hf).module("mlp", 0) is tiny_model("gpt2").modules.mlp(0)
