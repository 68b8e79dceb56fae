"""Optimised values: many at once equal each alone, and both the published loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.methods.memit import MEMITParams
from knowedit_ext.editing.methods.rome import ROMEParams
from knowedit_ext.editing.request import EditRequest
from knowedit_ext.editing.tokenized import tokenize_requests
from knowedit_ext.editing.values import STOP_LOSS, Values, optimise_values

from ..support.families import FAMILIES, LAYERS, tiny_model
from .models import editable
from .plain import PlainValue, plain_value

CONTEXTS = ["{}", "w11 w12. {}", "w13 w14 w15 w16. {}"]
REQUESTS = [
    EditRequest("w5 {} w9 w10", "w3 w7", "w20"),
    EditRequest("{} w9 w10 w12 w21", "w33", "w22 w23 w24"),  # three target tokens, the subject in front
    EditRequest("w6 w8 w15 {} w41", "w30 w31 w32", "w25 w26"),
    EditRequest("w17 w18 {}", "w45 w46", "w27"),  # the subject is the prompt's last token
]
PARAMS = ROMEParams(layers=(1,), v_num_grad_steps=8, v_lr=0.2, v_weight_decay=0.3, clamp_norm_factor=2.0)


def values(model: ke.EditableModel, requests=REQUESTS, params=PARAMS, site="mlp", layer=1, batch=None) -> Values:
    tokenized = tokenize_requests(model, requests, CONTEXTS, params.fact_token)
    loss_layer = params.v_loss_layer if site == "layer" else None
    return optimise_values(model, tokenized, params, site, layer, batch=batch, loss_layer=loss_layer)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Within `tolerance` of the size of what is wanted."""
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def as_published(got: Values, number: int, want: PlainValue) -> None:
    close(got.initial[number], want.initial, 1e-5)
    close(got.values[number], want.value)
    steps = len(want.losses) - 1  # an edit that ends by itself is known by its last loss, one that is stopped is not
    assert got.steps[number] == steps
    assert any(got.loss[number] == pytest.approx(loss, rel=1e-3, abs=1e-4) for loss in want.losses[-2:])


@pytest.mark.parametrize("site", ["mlp", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_published_loop(family: str, site: str) -> None:
    model = tiny_model(family)
    got = values(model, site=site)
    for number, request in enumerate(REQUESTS):
        as_published(got, number, plain_value(model, request, CONTEXTS, PARAMS, site, 1))


@pytest.mark.parametrize("fact_token", ["subject_first", "subject_first_after_last", "last"])
def test_other_fact_tokens(fact_token: str) -> None:
    model, params = tiny_model("llama"), replace(PARAMS, fact_token=fact_token)
    got = values(model, REQUESTS[:3], params)
    for number, request in enumerate(REQUESTS[:3]):
        as_published(got, number, plain_value(model, request, CONTEXTS, params, "mlp", 1))


# In a model that can be taught edits converge, at different steps, and leave the batch.
EASY = replace(PARAMS, v_num_grad_steps=20, v_lr=0.5, v_weight_decay=1e-3, clamp_norm_factor=20.0, kl_factor=1e-3)
TAUGHT = [
    EditRequest("w17 w18 {}", "w33", "w27"),
    EditRequest("w17 {}", "w45 w46", "w12"),
    EditRequest("{} w9", "w31", "w27"),  # never
    EditRequest("w17 {}", "w45 w46", "w27"),
    EditRequest("w5 w2 {}", "w40", "w12"),
]


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_batch_equals_each_alone(family: str) -> None:
    model = editable(family)
    alone = [values(model, [request], EASY, layer=0) for request in TAUGHT]
    steps = [int(one.steps[0]) for one in alone]
    assert len(set(steps)) > 2 and steps[2] == EASY.v_num_grad_steps - 1 and alone[2].loss[0] > STOP_LOSS
    for batch in (None, 2):
        got = values(model, TAUGHT, EASY, layer=0, batch=batch)
        assert got.steps.tolist() == steps
        for number, one in enumerate(alone):
            close(got.values[number], one.values[0])
            assert got.loss[number] == pytest.approx(float(one.loss[0]), rel=1e-3)


def test_stops_below_the_loss_and_takes_one_step_fewer_than_it_evaluates() -> None:
    model = editable("gpt2")
    got = values(model, TAUGHT, EASY, layer=0)
    stopped = 0
    for number, request in enumerate(TAUGHT):
        want = plain_value(model, request, CONTEXTS, EASY, "mlp", 0)
        as_published(got, number, want)
        assert all(loss >= STOP_LOSS for loss in want.losses[:-1])
        stopped += want.losses[-1] < STOP_LOSS
        assert want.losses[-1] < STOP_LOSS or got.steps[number] == EASY.v_num_grad_steps - 1
    assert stopped > 1
    nothing = values(model, params=replace(PARAMS, v_num_grad_steps=1))
    assert torch.equal(nothing.values, nothing.initial) and not nothing.steps.any()


def test_stays_in_the_ball() -> None:
    params = replace(PARAMS, v_lr=5.0, clamp_norm_factor=0.7)
    got = values(tiny_model("gpt2"), params=params)
    norms = (got.values - got.initial).norm(dim=1)
    assert torch.allclose(norms, 0.7 * got.initial.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("loss_layer", [2, LAYERS - 1, 0])
def test_a_loss_read_from_a_lower_layer(loss_layer: int) -> None:
    model = tiny_model("gpt2")
    params = MEMITParams(layers=(1,), v_num_grad_steps=6, v_lr=0.2, v_loss_layer=loss_layer, clamp_norm_factor=2.0)
    if loss_layer == 0:
        with pytest.raises(ValueError, match="layer 1 is the last one before the loss"):
            values(model, params=params, site="layer")
        return
    got = values(model, params=params, site="layer")
    for number, request in enumerate(REQUESTS):
        as_published(got, number, plain_value(model, request, CONTEXTS, params, "layer", 1))


def test_rome_reads_its_loss_at_the_end() -> None:
    """The published compute_v records `v_loss_layer` and never uses it."""
    model, params = tiny_model("gpt2"), replace(PARAMS, v_num_grad_steps=3, mom2_adjustment=False)
    early, late = (ke.rome(model, REQUESTS[0], p, contexts=["{}"]) for p in (replace(params, v_loss_layer=2), params))
    (name,) = early.changes
    assert torch.equal(early.delta(name), late.delta(name))
