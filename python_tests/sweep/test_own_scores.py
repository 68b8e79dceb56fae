"""Bloom, Falcon and MPT: attention classes that compute their scores themselves, with biases by distance (ALiBi)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.evaluation.nll import score
from knowedit_ext.model.facts import tokenize_fact
from knowedit_ext.sweep import own_scores
from knowedit_ext.sweep.whole import mixes_whole
from knowedit_ext.tracing.heads import head_attention

from ..evaluation.test_nll import assert_equal as assert_scores
from ..evaluation.test_nll import some_questions
from ..support.families import VOCAB
from ..support.more_families import more_hf
from ..support.oracle import plain_knockout, plain_trace
from ..support.tokenizers import word_level
from ..tracing.test_against_the_loop import FACTS, IDS, NOISE, SAMPLES, assert_equal, noisy

pytestmark = pytest.mark.filterwarnings("ignore:corrupting")

# 16 heads: slopes that are no powers of two, which Falcon rounds to bfloat16 at every position.
MODELS = [
    ("bloom", dict(n_head=16)),
    ("falcon", dict(alibi=True, num_attention_heads=16)),
    ("falcon", dict(alibi=True, new_decoder_architecture=True, num_kv_heads=2)),
    ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    ("mpt", dict(n_heads=16)),
    ("mpt", dict(attn_config=dict(clip_qkv=0.5, softmax_scale=0.2))),
]
every_model = pytest.mark.parametrize(
    ("family", "changed"), MODELS, ids=[f"{family}-{'-'.join(changed)}" for family, changed in MODELS]
)


def model_of(family: str, changed: dict, dtype: torch.dtype = torch.float32) -> ke.EditableModel:
    hf = more_hf(family, **changed)
    return ke.load_model((hf.to(dtype), word_level(VOCAB)))


def assert_as_the_loop(model: ke.EditableModel) -> None:
    for kind in ("state", "mlp", "attn"):
        if kind in model.modules.family.without:
            continue
        together = ke.trace(model, FACTS, kind=kind, window=2, samples=SAMPLES, noise=NOISE)
        for number, got in enumerate(together):
            want = plain_trace(model.hf, IDS[number], noisy(number), got.answer_ids, kind, 2, None)
            assert_equal(got, want)


@every_model
def test_traces_of_prompts_of_many_lengths(family: str, changed: dict) -> None:
    model = model_of(family, changed)
    assert not mixes_whole(model.modules)
    assert_as_the_loop(model)
    questions = some_questions(4, seed=1)
    assert_scores(model, score(model, questions)[0], questions)


def test_alibi_that_the_class_adds_twice() -> None:
    model = model_of(*MODELS[1])
    once = model.hf(torch.tensor([IDS[0]])).logits
    model.hf.config._attn_implementation = "eager"
    assert mixes_whole(model.modules)
    assert (model.hf(torch.tensor([IDS[0]])).logits - once).abs().max() > 0.01
    assert_as_the_loop(model)


@pytest.mark.parametrize("family", ["bloom", "falcon", "mpt"])
def test_classes_that_came_with_a_checkpoint_run_whole_sequences(family: str, monkeypatch) -> None:
    model = model_of(family, {"alibi": True} if family == "falcon" else {})
    monkeypatch.setattr(own_scores, "_CLASSES", {})
    assert mixes_whole(model.modules)
    assert_as_the_loop(model)


@every_model
@pytest.mark.parametrize("factor", [0.0, 0.8, 1.25])
def test_another_slope_is_refused(family: str, changed: dict, factor: float, monkeypatch) -> None:
    model = model_of(family, changed)
    key, given = type(model.modules.attn(0)).__module__, "position_bias" if family == "mpt" else "alibi"
    right = own_scores._CLASSES[key]

    def wrong(module, attend, **named):
        if named.get(given) is None:
            pytest.skip("it has none")
        return right(module, attend, **named | {given: named[given] * factor})

    monkeypatch.setitem(own_scores._CLASSES, key, wrong)
    with pytest.raises(ke.UnsupportedModelError, match="the logits of a sweep are off by"):
        ke.trace(model, FACTS[0], samples=2, noise=NOISE)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_the_guard(family: str, changed: dict, dtype: torch.dtype) -> None:
    assert np.isfinite(ke.trace(model_of(family, changed, dtype), FACTS[0], samples=2, noise=NOISE).scores).all()


@pytest.mark.parametrize(("family", "changed"), MODELS[:3])  # the loop's cuts are for masks that are added
def test_edges_are_cut_but_not_a_tokens_own(family: str, changed: dict) -> None:
    model, groups = model_of(family, changed), {"some": [1, 2, 4], "first": [0]}
    traced = ke.trace(model, FACTS[0], "knockout", window=2, groups=groups)
    for name, unseen in groups.items():
        want = np.exp(plain_knockout(model.hf, IDS[0], traced.answer_ids, unseen, 2))
        np.testing.assert_allclose(traced.scores[name], want, atol=1e-5, rtol=0)
    with pytest.raises(ke.UnsupportedModelError, match="cannot keep a token from seeing itself"):
        ke.trace(model, FACTS[0], "knockout")


def _once(attention: torch.nn.Module, args: tuple, named: dict) -> tuple[tuple, dict]:
    """Falcon's mask holds the ALiBi that the scores get once more where weights are asked for."""
    return args, named | {"alibi": None if named["alibi"] is None else torch.zeros_like(named["alibi"])}


@every_model
def test_attention_of_heads_is_the_models_own(family: str, changed: dict) -> None:
    model = model_of(family, changed)
    found = head_attention(model, FACTS)
    model.hf.config._attn_implementation = "eager"  # its setter leaves Falcon as it is
    for attention in map(model.modules.attn, range(model.num_layers) if family == "falcon" else ()):
        attention.register_forward_pre_hook(_once, with_kwargs=True)
    for fact, measured in zip(FACTS, found, strict=True):
        tokenized = tokenize_fact(model, fact)
        with torch.no_grad():
            layers = model.hf(torch.tensor([tokenized.ids]), output_attentions=True).attentions
        want = torch.stack([x[0, :, -1, tokenized.subject_range[1] - 1] for x in layers])
        assert measured[0] == pytest.approx(want.numpy(), abs=2e-5)
