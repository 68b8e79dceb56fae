"""A step of value optimisation waits for the device once, plans nothing, and multiplies as the model does."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing import values
from knowedit_ext.editing.tokenized import tokenize_requests
from knowedit_ext.model.hooks import learning, resting
from knowedit_ext.sweep import frozen

from ..support.fake_gpu import Watch, fake_gpu, moved
from ..support.families import LAYERS, tiny_model

REQUESTS = [
    ke.EditRequest(prompt="w5 {} w7 w9", subject="w3 w8", target_new=" w2 w4"),
    ke.EditRequest(prompt="{} w7", subject="w6", target_new=" w8"),
    ke.EditRequest(prompt="w5 {} w7 w9", subject="w4", target_new=" w20"),
]
PARAMS = ke.ROMEParams(layers=[1], v_num_grad_steps=12, v_lr=0.5, v_weight_decay=1e-3, clamp_norm_factor=4)


def tokenized(model: ke.EditableModel) -> list:
    return tokenize_requests(model, REQUESTS, ["{}", "w11 . {}"], "subject_last")


def batch_of(model: ke.EditableModel, layer: int) -> values._Batch:
    """A batch in front of its first step."""
    requests = tokenized(model)
    prompts = [values._prompts(model, n, request, "subject_last") for n, request in enumerate(requests)]
    batch = values._Batch(
        model, prompts, requests, [9] * 3, False, PARAMS, ("mlp",), layer, LAYERS, 1.0, None, False
    )  # fmt: skip
    with resting(model), learning(model):
        batch._freeze(range(3))
    firsts = batch.bare.tolist()
    batch.now = values.InProgress.begin(
        batch.frozen.initial[firsts], 1.0, batch.minimise, batch.updates, batch.impatient
    )
    return batch


def step(batch: values._Batch) -> None:
    """Its forward pass: a build without CUDA has no other for tensors that only say they are there."""
    batch._loss(batch.now.delta, range(3))


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "mistral"])
@pytest.mark.parametrize("layer", [0, 1, LAYERS - 2])
def test_a_step_waits_for_nothing_but_who_goes_on(family: str, layer: int) -> None:
    batch = batch_of(tiny_model(family), layer)
    with fake_gpu(tiny_model(family)) as model:
        there = moved(batch, model)
        with resting(model), (watch := Watch()):
            step(there)
        assert there.now.delta.device.type == "cuda"
    assert not watch.waits and not watch.sent


def test_what_a_step_would_wait_for_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = values.log_probabilities
    monkeypatch.setattr(
        values, "log_probabilities", lambda model, read, targets: real(model, read, targets.cpu().to(read.device))
    )
    batch = batch_of(tiny_model("gpt2"), 1)
    with fake_gpu(tiny_model("gpt2")) as model, resting(model), (watch := Watch()):
        step(moved(batch, model))
    assert any("values.py" in place for place in watch.waits) and watch.sent


@pytest.mark.parametrize("layer", [0, 1, LAYERS - 2])
def test_edits_that_leave_are_not_planned_again(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plans, left = tiny_model("llama"), [], []
    real, only = frozen.Planner, frozen.FrozenPrompts.only
    monkeypatch.setattr(frozen, "Planner", lambda *given: plans.append(1) or real(*given))
    monkeypatch.setattr(frozen.FrozenPrompts, "only", lambda self, kept: left.append(kept) or only(self, kept))
    monkeypatch.setattr(values, "STOP_LOSS", 2.0)
    optimise = partial(values.optimise_values, model, params=PARAMS, site="mlp", layer=layer)
    together = optimise(tokenized(model), batch=3)
    assert left and len(plans) == 1
    alone = [optimise([request]) for request in tokenized(model)]
    torch.testing.assert_close(together.values, torch.cat([one.values for one in alone]), atol=1e-4, rtol=1e-4)
    assert together.steps.tolist() == [int(one.steps) for one in alone] and len(set(together.steps.tolist())) > 1


@pytest.mark.parametrize("precision", [None, "tf32"])
def test_gradients_are_multiplied_as_the_forward_pass_is(precision, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_model("gpt2")
    model = ke.EditableModel(copy.deepcopy(tiny.hf), tiny.tokenizer, precision=precision)
    seen, real = [], torch.autograd.grad
    kind = lambda: torch.backends.cuda.matmul.fp32_precision  # noqa: E731
    before = kind()
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: seen.append(kind()) or real(*a, **k))
    values.optimise_values(model, tokenized(model)[:1], PARAMS, "mlp", 1)
    assert set(seen) == {precision or before} and kind() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_cuda_waits_for_nothing_but_who_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass too; who goes on is asked for outside."""
    tiny = tiny_model("gpt2")
    model = ke.load_model((copy.deepcopy(tiny.hf), tiny.tokenizer), device="cuda")
    values.optimise_values(model, tokenized(model), PARAMS, "mlp", 1)  # kernels are loaded
    batch = batch_of(model, 1)
    with resting(model), learning(model):
        variable = batch.now.delta.requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, _, _ = batch._loss(variable, range(3))
            (gradient,) = torch.autograd.grad(loss.sum(), variable)
            batch.now.move(gradient, 0, PARAMS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
