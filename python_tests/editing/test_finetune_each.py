"""Trainings side by side against one after the other, which `test_finetune.py` holds against the plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing import finetune_each
from knowedit_ext.editing.methods.finetune import FTParams, finetune
from knowedit_ext.editing.request import EditRequest
from knowedit_ext.tracing.subject_noise import SubjectNoise

from ..support.families import FAMILIES
from ..support.tokenizers import word_level
from ..support.unchanged import assert_unchanged, snapshot
from .models import fresh, unlikely
from .test_finetune import REQUESTS, ROUNDING, exact

FEW = FTParams(layers=(1,), num_steps=4, lr=5e-3)
MANY = FTParams(layers=(1,), num_steps=40, lr=2e-2)  # some are done long before the others


def assert_as_alone(
    model: ke.EditableModel, requests: list[EditRequest], params: FTParams, rounding: float = 1e-9, **options
) -> None:
    before = snapshot(model.hf)
    alone = [finetune(model, request, params, options.get("compat")) for request in requests]
    edits = list(finetune_each(model, requests, params, **options))
    assert_unchanged(before, model.hf)
    assert len(edits) == len(requests)
    for edit, want, request in zip(edits, alone, requests, strict=True):
        assert edit.requests == want.requests == [request.to_dict()] and edit.params == want.params
        assert edit.method == want.method and edit.compat == want.compat and list(edit.changes) == list(want.changes)
        for name in want.changes:
            change = want.delta(name)
            assert change.any() and (edit.delta(name) - change).norm() <= rounding * change.norm(), name


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_one_by_one(family: str, compat: str | None) -> None:
    assert_as_alone(exact(family), REQUESTS, FEW, ROUNDING.get(family, 1e-9), compat=compat)


@pytest.mark.parametrize(
    "changes",
    [
        dict(layers=(0,)),
        dict(layers=(3,)),
        dict(layers=(0, 2)),
        dict(norm_constraint=4e-3),
        dict(weight_decay=0.5),
        dict(wd_power_law=(-0.5, -1.0)),
        dict(bias=True),
        dict(batch_size=2),
        dict(num_steps=1),
        dict(rewrite_module_tmp="transformer.h.{}.attn.c_attn"),
        dict(rewrite_module_tmp="transformer.h.{}"),
    ],
)
def test_settings(changes: dict) -> None:
    assert_as_alone(exact("gpt2"), REQUESTS, replace(FEW, **changes), 1e-6)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_some_are_done_before_others(batch: int) -> None:
    model = exact("llama")
    requests = [unlikely(model, "w17 w18 {}", "w33"), *REQUESTS, replace(REQUESTS[1], target_new="w41")]
    assert_as_alone(model, requests, MANY, 1e-6, batch=batch)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_noise_drawn_anew_and_a_target_made_less_likely(family: str) -> None:
    """As Hase et al.: a small loss teaches nothing and ends nothing for a while, and noise goes on being drawn."""
    model = exact(family)
    likeliest = unlikely(model, "w17 w18 {}", "w33", most=1.0)
    requests = [
        replace(REQUESTS[0], noise=SubjectNoise(0.5, samples=3)),
        replace(likeliest, minimise=True),
        replace(likeliest, noise=SubjectNoise(0.5, samples=2), minimise=True),
    ]
    assert_as_alone(model, requests, replace(MANY, num_steps=20), 1e-6, compat="hase")


def test_in_half_precision() -> None:
    model = ke.load_model((fresh("llama").hf.to(torch.bfloat16), word_level()))
    for edit in finetune_each(model, REQUESTS, MANY):
        [change] = edit.changes.values()
        assert change.dtype == torch.float32 and change.any()


def test_passes_are_shared() -> None:
    model, passes = fresh("gpt2"), []

    def count(module: torch.nn.Module, args: tuple) -> None:
        passes.append(args[0].requires_grad)

    model.modules.layers[3].register_forward_pre_hook(count)
    list(finetune_each(model, REQUESTS, FEW, batch=3))
    together = sum(passes)
    list(finetune_each(model, REQUESTS, FEW, batch=1))
    assert together == FEW.num_steps and sum(passes) - together == len(REQUESTS) * FEW.num_steps


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    model, passes = fresh("gpt2"), []
    model.modules.layers[3].register_forward_pre_hook(lambda module, args: passes.append(1))
    with pytest.raises(ValueError, match="layer 9 is out of range"):
        finetune_each(model, REQUESTS, replace(FEW, layers=(9,)))
    with pytest.raises(ValueError, match="no edit requests"):
        finetune_each(model, [], FEW)
    with pytest.raises(ValueError, match="kl_factor is 0.1"):
        finetune_each(model, REQUESTS, replace(FEW, kl_factor=0.1))
    edits = finetune_each(model, REQUESTS, FEW, batch=1)
    assert isinstance(edits, Iterator) and not passes
    next(edits)
    assert passes


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_left_as_found_when_stopped(kind: type[BaseException]) -> None:
    model, calls = fresh("gpt2"), []

    def stop(module: torch.nn.Module, args: tuple) -> None:
        calls.append(bool(args[0].requires_grad))
        if sum(calls) == 3:
            raise kind("on purpose")

    model.modules.layers[2].register_forward_pre_hook(stop)
    before = snapshot(model.hf)
    with pytest.raises(kind, match="on purpose"):
        list(finetune_each(model, REQUESTS, FEW))
    assert_unchanged(before, model.hf)
    assert not model.modules.down_projection(1)._forward_hooks


def test_a_loss_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="try a lower lr than 1e"):
        list(finetune_each(fresh("gpt2"), REQUESTS, replace(MANY, lr=1e30)))
