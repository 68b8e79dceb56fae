"""Attribution: a derivative of the plain loop's restored runs; exact where refined; told apart in files and folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.model.hooks import Hooks, resting
from knowedit_ext.tracing.attribution import agreement, strongest
from knowedit_ext.tracing.kinds import KINDS, window_layers
from knowedit_ext.world import load_world

from ..support.families import FAMILIES, tiny_hf
from ..support.tokenizers import word_level

FACT = ke.Fact("w5 {} w9 w10", "w3 w7")
SAMPLES = 2


def double(family: str) -> ke.EditableModel:
    return ke.load_model((tiny_hf(family).double(), word_level()))


def plain_derivatives(model: ke.EditableModel, kind: str, window: int, target: int) -> np.ndarray:
    """d log-odds / d share, [samples, tokens, layers], of moving a cell's outputs from corrupted to clean: hooks on the
    model's own forward, a pass a cell."""
    tokenized = ke.trace(model, FACT, samples=SAMPLES, noise=0.5, window=window)  # its draws are the published ones
    ids, (first, after) = torch.tensor(tokenized.input_ids), tokenized.subject_range
    site, layers = KINDS[kind].site, model.num_layers
    drawn = np.random.RandomState(1).randn(SAMPLES, after - first, model.hidden_size) * 0.5

    def noise(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, first:after] += torch.from_numpy(drawn)
        return x

    def run(copies: int, corrupt: bool, act: Callable) -> torch.Tensor:
        with resting(model), torch.enable_grad(), Hooks() as hooks:
            if corrupt:
                hooks.behind(model.modules.embedding, noise)
            for layer in range(layers):
                hooks.behind(model.modules.site(site, layer), lambda x, layer=layer: act(layer, x))
            p = model.hf(ids.expand(copies, -1)).logits[:, -1].log_softmax(-1)[:, target].exp()
            return torch.logit(p)

    clean, corrupted = {}, {}
    run(1, False, lambda layer, x: clean.__setitem__(layer, x.clone()))
    run(SAMPLES, True, lambda layer, x: corrupted.__setitem__(layer, x.clone()))

    def moved(layer: int, token: int) -> torch.Tensor:
        share = torch.zeros(SAMPLES, 1, dtype=torch.float64, requires_grad=True)

        def act(number: int, x: torch.Tensor) -> torch.Tensor | None:
            if number != layer:
                return None
            x = x.clone()
            x[:, token] += share * (clean[layer][:, token] - corrupted[layer][:, token])
            return x

        return torch.autograd.grad(run(SAMPLES, True, act).sum(), share)[0][:, 0]

    found = np.zeros((SAMPLES, len(ids), layers))
    for token in range(len(ids)):
        each = [moved(layer, token).numpy() for layer in range(layers)]
        for layer in range(layers):
            restored = window_layers(layer, window, layers) if KINDS[kind].windowed else (layer,)
            found[:, token, layer] = sum(each[one] for one in restored)  # to first order layers add up
    return found


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_are_the_derivative(family: str, kind: str) -> None:
    model = double(family)
    trace = ke.trace(model, FACT, kind, 2, SAMPLES, 0.5, method="attribution")
    want = plain_derivatives(model, kind, 2, trace.answer_ids[0])
    low = torch.logit(torch.from_numpy(trace.low_samples).double())[:, None, None]
    got = torch.logit(torch.from_numpy(trace.sample_scores).double()) - low
    assert np.abs(got.numpy() - want).max() <= 1e-3 * np.abs(want).max() + 1e-4  # scores are kept in float32


@pytest.mark.parametrize("score", ["probability", "logprob"])
def test_refined_cells_are_exact(score: str) -> None:
    model = ke.load_model(load_world().folder, dtype="float32")
    fact = ke.Fact.from_prompt(*[load_world().facts()[0][key] for key in ("prompt", "subject")])
    exact = ke.trace(model, fact, score=score, noise=0.3)
    trace = ke.trace(model, fact, score=score, noise=0.3, method="attribution", refine=9)
    cells = tuple(np.array(trace.refined).T)
    assert len(trace.refined) == 9 and cells[0].min() >= trace.subject_range[0]
    assert np.allclose(trace.scores[cells], exact.scores[cells], atol=2e-5)
    assert np.allclose(
        trace.sample_scores[(slice(None), *cells)], exact.sample_scores[(slice(None), *cells)], atol=2e-5
    )
    assert trace.agreement == agreement(trace.estimate[cells], trace.scores[cells]) and trace.agreement > 0.5
    assert np.isclose(trace.low_score, exact.low_score, atol=1e-4) and np.isclose(
        trace.high_score, exact.high_score, atol=1e-4
    )
    rest = np.ones_like(trace.scores, bool)
    rest[cells] = False
    assert np.array_equal(trace.scores[rest], trace.estimate[rest])
    assert trace.scores.min() >= 0 or score == "logprob"
    everything = ke.trace(model, fact, score=score, noise=0.3, method="attribution", refine=10**6)
    assert np.allclose(everything.scores, exact.scores, atol=2e-5)
    assert np.corrcoef(everything.estimate.ravel(), exact.scores.ravel())[0, 1] > 0.7


def test_other_answers_and_corruptions() -> None:
    model = double("llama")
    for more in (
        dict(answer_tokens=2),
        dict(replace=True),
        dict(corrupt_with="w4 w8"),
        dict(tokens="subject_last"),
        dict(score="logit_difference", against="w20"),
    ):
        common = dict(kind="mlp", window=2, samples=2, noise=0.5) | more
        exact = ke.trace(model, FACT, **common)
        trace = ke.trace(model, FACT, **common, method="attribution", refine=10**6)
        assert np.allclose(trace.scores, exact.scores, atol=1e-6, equal_nan=True)
        assert np.allclose(trace.low_samples, exact.low_samples, atol=1e-6)
        assert np.array_equal(np.isnan(trace.estimate), np.isnan(exact.scores))


def test_a_file_keeps_it(tmp_path: Path) -> None:
    trace = ke.trace(double("gpt2"), FACT, noise=0.5, method="attribution", refine=4)
    trace.save(tmp_path / "a.npz")
    loaded = ke.Trace.load(tmp_path / "a.npz")
    assert np.array_equal(loaded.estimate, trace.estimate) and loaded.refined == trace.refined
    assert loaded.agreement == trace.agreement and loaded.settings["method"] == "attribution"


def test_a_folder_of_estimates_is_no_folder_of_traces(tmp_path: Path) -> None:
    model, facts = double("gpt2"), [FACT, ke.Fact("w5 {} w9", "w3")]
    common = dict(noise=0.5, samples=2, kinds=("state", "mlp"), window=2, progress=False)
    effects = ke.trace_dataset(model, facts, tmp_path, **common, method="attribution", refine=3)
    assert effects.kinds and (tmp_path / "summary.json").exists()
    for other in (dict(), dict(method="attribution"), dict(method="attribution", refine=4)):
        with pytest.raises(ValueError, match="other settings"):
            ke.trace_dataset(model, facts, tmp_path, **common, **other)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(refine=3), "refine"),
        (dict(method="attribution", sever="mlp"), "no sever"),
        (dict(method="attribution", compat="reference"), "no compat"),
        (dict(method="guess"), "method"),
        (dict(method="attribution", refine=-1), "refine"),
        (dict(method="attribution", kind="knockout", noise="s3"), "knockout"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ke.trace(double("gpt2"), FACT, **({"noise": 0.5} | settings))


def test_strongest() -> None:
    effects = np.array([[np.nan, np.nan, np.nan], [0.1, -0.5, 0.2], [0.2, 0.0, 0.3]])
    assert strongest(effects, 3) == [(1, 1), (2, 2), (1, 2)]
    assert len(strongest(effects, 99)) == 6 and strongest(effects, 0) == []
    assert np.isnan(agreement(np.ones(2), np.ones(2))) and np.isnan(agreement(np.ones(5), np.arange(5)))
