"""Layers that take keys and values from earlier ones (Gemma 4 E2B and E4B): each run's own, with their gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

import knowedit_ext as ke
from knowedit_ext.editing.methods.finetune import finetune
from knowedit_ext.evaluation.edited import Edited
from knowedit_ext.evaluation.nll import score
from knowedit_ext.sweep import clean_run, handed, plan
from knowedit_ext.sweep.capture import clean_runs
from knowedit_ext.sweep.newborn import NewbornRows
from knowedit_ext.sweep.probe import probe

from ..editing import test_finetune as plain_ft
from ..editing.plain import plain_value, weight_name
from ..editing.test_values import CONTEXTS, PARAMS, REQUESTS, as_published, values
from ..evaluation.test_nll import assert_equal as assert_scores
from ..evaluation.test_nll import random_edit, some_questions
from ..support.families import VOCAB
from ..support.more_families import more_hf, more_model
from ..support.oracle import plain_knockout, plain_trace
from ..support.tokenizers import word_level
from ..tracing.test_against_the_loop import CASES, FACTS, IDS, NOISE, SAMPLES, assert_equal, noisy

pytestmark = [
    pytest.mark.filterwarnings("ignore:corrupting"),
    pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="shares keys by the cache"),
]

LAYERS = 7
SLIDING, FULL = 2, 3  # whose keys and values the last three layers read, of sliding and of full attention
KINDS = ["sliding_attention", "full_attention"]
SHARING = dict(
    num_hidden_layers=LAYERS,
    layer_types=[KINDS[n in (1, FULL, 5, 6)] for n in range(LAYERS)],
    num_kv_shared_layers=3,
    hidden_size_per_layer_input=6,
    vocab_size_per_layer_input=VOCAB,
    use_double_wide_mlp=True,
)


@cache
def model() -> ke.EditableModel:
    return more_model("gemma4_text", **SHARING)


def test_who_takes_from_whom() -> None:
    kinds = [
        (a.layer_type[0], a.is_kv_shared_layer, a.store_full_length_kv) for a in map(model().modules.attn, range(7))
    ]
    assert [kind for kind, *_ in kinds] == list("sfsfsff")
    assert [at for at, (_, reads, _) in enumerate(kinds) if reads] == [4, 5, 6]
    assert [at for at, (*_, stores) in enumerate(kinds) if stores] == [SLIDING, FULL]
    found = [named["shared_kv_states"] for named in clean_run(model(), IDS[0]).arguments]
    assert [len(each.shapes) for each in found] == [0, 0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("kind, window, sever", CASES)
def test_traces_in_one_sweep_and_in_many(kind: str, window: int, sever: str | None) -> None:
    asked = dict(kind=kind, window=window, sever=sever, samples=SAMPLES, noise=NOISE)
    for max_rows in (None, 40):
        for number, got in enumerate(ke.trace(model(), FACTS, max_rows=max_rows, **asked)):
            assert_equal(got, plain_trace(model().hf, IDS[number], noisy(number), got.answer_ids, kind, window, sever))


def test_cut_edges() -> None:
    groups = {"before": [0, 3], "late": [4]}
    traced = ke.trace(model(), FACTS[0], "knockout", window=1, groups=groups)
    for name, unseen in groups.items():
        want = np.exp(plain_knockout(model().hf, IDS[0], traced.answer_ids, unseen, 1))
        np.testing.assert_allclose(traced.scores[name], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("edited", [1, SLIDING, FULL, 5])
def test_scores_of_edits(edited: int) -> None:
    """Below, at and behind the layers that are read from."""
    questions = some_questions(4, seed=1)
    edit = random_edit(model(), edited, 0)
    pre, post = score(model(), questions, Edited(model(), edit))
    assert_scores(model(), pre, questions)
    with edit.applied(model()):
        assert_scores(model(), post, questions)


@cache
def exact() -> ke.EditableModel:
    return ke.load_model((more_hf("gemma4_text", **SHARING).double(), word_level()))


@pytest.mark.parametrize("site", ["mlp", "layer"])
@pytest.mark.parametrize("edited", [0, 1, SLIDING])
def test_values(edited: int, site: str) -> None:
    """One alone, and several of which some end before others."""
    params = replace(PARAMS, layers=(edited,))
    got = values(exact(), REQUESTS[:2], params, site, edited)
    for number in range(2):
        as_published(got, number, plain_value(exact(), REQUESTS[number], CONTEXTS, params, site, edited))


@pytest.mark.parametrize("edited", [FULL, 4, LAYERS - 1])
def test_values_that_reach_no_other_token_are_refused(edited: int) -> None:
    """From the last layer with keys of its own on, what a token's MLP puts out is read by that token alone."""
    with pytest.raises(ValueError, match=f"layer {edited} .* nothing behind it can carry a change"):
        values(exact(), REQUESTS[:1], replace(PARAMS, layers=(edited,)), "mlp", edited)


@pytest.mark.parametrize("edited", [1, SLIDING, 5])
def test_finetuning(edited: int) -> None:
    hf = more_hf("gemma4_text", scale=6.0, **SHARING).double()
    loaded, params = ke.load_model((hf, word_level())), replace(plain_ft.BRIEF, layers=(edited,))
    want = plain_ft.plain_finetune(loaded, plain_ft.REQUESTS, params, [weight_name(loaded, edited)], False, alone=True)
    plain_ft.assert_close(finetune(loaded, plain_ft.REQUESTS, params), want, 1e-4)


def test_rows_born_in_an_mlp() -> None:
    """They are the clean run's where nothing is taken from them."""
    rows = NewbornRows(model(), clean_runs(model(), IDS[:2]), [(0, 6), (1, 4)])
    born = rows.run([0, 1, SLIDING, FULL, 5], torch.ones(1))
    torch.testing.assert_close(born.states[2:], born.states[:2].repeat(5, 1), atol=1e-4, rtol=1e-4)


# -- planted faults --------------------------------------------------------------------------------------------------


def _of_whom_it_was_restored_from(real):
    return lambda roots, used, layers, handed=False: real(roots, used, layers)


def _of_neighbours(real):
    return lambda self, columns: real(self, columns.roll(1, 0))


def _without_gradients(real):
    return lambda self, columns: real(self, columns.detach())


FAULTS = {
    "of whom it was restored from": (plan, "Planner", _of_whom_it_was_restored_from),
    "of neighbours": (handed.Handed, "mapping", _of_neighbours),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, planted = FAULTS[fault]
    monkeypatch.setattr(where, name, planted(getattr(where, name)))
    model().probed = False
    try:
        with pytest.raises(ke.UnsupportedModelError, match="the logits of a sweep are off by"):
            probe(model())
    finally:
        model().probed = False


def test_without_its_gradients_a_value_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    right = values(model(), REQUESTS[:1], PARAMS, "mlp", 1).values
    monkeypatch.setattr(handed.Handed, "mapping", _without_gradients(handed.Handed.mapping))
    assert (values(model(), REQUESTS[:1], PARAMS, "mlp", 1).values - right).abs().max() > 1e-3


def test_what_is_laid_out_otherwise_is_not_found() -> None:
    """So a layer that reads it says so; numbers of other rows it does not get."""
    keys = torch.zeros(1, 2, 5, 3)
    mapping = {"keys": (keys, keys[..., :1]), "one": keys, "rows": (keys[0],), "longer": (keys.repeat(1, 1, 2, 1),)}
    assert handed.Handed.of(mapping, 5).shapes == (("keys", ((2, 3), (2, 1))),)
    filled = {"keys": (torch.randn(1, 2, 4, 3), torch.randn(1, 2, 4, 1))}
    found = handed.Handed.of(mapping, 5)
    again = found.mapping(torch.cat(found.columns(filled), 1))
    assert all(torch.equal(x, y) for x, y in zip(again["keys"], filled["keys"], strict=True))
