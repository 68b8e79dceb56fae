"""RECT and PRUNE beside a plain reading of what AlphaEdit's repository runs, and of what is meant."""

from __future__ import annotations

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.changes import LowRank

from ..support.unchanged import assert_unchanged, snapshot
from .models import fresh
from .plain import down_projection, weight_name

FAMILIES = ["gpt2", "llama"]


def made(model: ke.EditableModel, low_rank: bool, size: float = 1.0) -> ke.Edit:
    module, generator = down_projection(model, 1), torch.Generator().manual_seed(int(10 * size))
    first = not isinstance(module, torch.nn.Linear)
    d_in, d_out = module.weight.shape if first else module.weight.shape[::-1]
    inputs, outputs = (size * torch.randn(d, 6, generator=generator) for d in (d_in, d_out))
    change = LowRank(inputs, outputs, first)
    edit = ke.Edit({weight_name(model, 1): change}, "memit")
    return (edit if low_rank else ke.Edit({n: edit.delta(n) for n in edit.changes}, "ft")).bind(model)


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rect(family: str, compat: str | None) -> None:
    """The largest 40 % of |dW / W|: W before any edit, or as released the one that holds earlier edits."""
    model = fresh(family)
    before, edit = snapshot(model.hf), made(model, True)
    name, original = weight_name(model, 1), down_projection(model, 1).weight.detach().clone().double()
    with made(model, True, 0.5).applied(model):
        now = down_projection(model, 1).weight.detach().clone().double()
        got = ke.rect(model, edit, compat=compat).delta(name)
        third = ke.rect(model, edit, keep=0.3, compat=compat).delta(name)
    delta = edit.delta(name).double()
    relative = (delta / (original if compat is None else now + 1e-8)).abs()
    least = relative.flatten().sort().values[int(0.6 * relative.numel()) - 1]
    assert torch.allclose(got.double(), torch.where(relative >= least, delta, 0.0))
    assert float((third != 0).double().mean()) == pytest.approx(0.3, abs=1e-3)
    assert_unchanged(before, model.hf)


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_prune(family: str, low_rank: bool, compat: str | None) -> None:
    """evaluate.py:274-318 on the sum of two edits, that are in the model: their restrained sum, alone or on top."""
    model, name = fresh(family), None
    edits = [made(model, low_rank, size) for size in (1.0, 0.4)]
    name, original = weight_name(model, 1), down_projection(model, 1).weight.detach().clone().double()
    for edit in edits:
        edit.apply(model)
    got = ke.prune(model, ke.Edit.merge(edits), compat=compat)
    for edit in reversed(edits):
        edit.revert(model)
    total = sum(edit.delta(name).double() for edit in edits)
    most = torch.linalg.svdvals(original).max()
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    assert (s > most).any() and (s < most).any()
    restrained = u @ torch.diag(torch.where(s > most, s.log() - most.log() + most, s)) @ vh
    want = restrained if compat is None else total + restrained
    assert torch.allclose(got.delta(name).double(), want, atol=1e-4 * float(want.abs().max()))
    assert isinstance(got.changes[name], LowRank) == low_rank and "prune" in got.method
    with got.applied(model):
        pass


@pytest.mark.parametrize("transform", [ke.rect, ke.prune])
def test_of_another_model(transform) -> None:
    edit = made(fresh("llama", seed=1), True)
    with pytest.raises(ValueError, match="other bits|different|another|not the one"):
        transform(fresh("llama"), edit)
    with pytest.raises(ValueError):
        ke.rect(fresh("llama"), made(fresh("llama"), True), keep=1.5)
