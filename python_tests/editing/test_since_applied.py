"""What else happens to a weight while an edit is in force is not undone with it, unless asked."""

from __future__ import annotations

import pytest
import torch

from .models import fresh
from .plain import weight_name
from .test_edit import random_edit

WEIGHT = weight_name(fresh("gpt2"), 2)


def trained(hf: torch.nn.Module) -> None:
    hf.get_parameter(WEIGHT).data.add_(1.0)


def loaded(hf: torch.nn.Module) -> None:
    hf.load_state_dict(fresh("gpt2").hf.state_dict())


def replaced(hf: torch.nn.Module) -> None:
    path, _, leaf = WEIGHT.rpartition(".")
    setattr(hf.get_submodule(path), leaf, torch.nn.Parameter(hf.get_parameter(WEIGHT).detach().clone()))


@pytest.mark.parametrize("touch", [trained, loaded, replaced])
@pytest.mark.parametrize("later", [False, True])
def test_what_was_done_since_is_not_undone_unasked(touch, later: bool) -> None:
    model = fresh("gpt2")
    before = model.hf.get_parameter(WEIGHT).detach().clone()
    edit, above = random_edit(model), random_edit(model, seed=1)
    edit.apply(model)
    if later:
        above.apply(model)
    touch(model.hf)
    there = model.hf.get_parameter(WEIGHT).detach().clone()
    with pytest.raises(ValueError, match="since the edit was applied"):
        edit.revert(model)
    assert torch.equal(model.hf.get_parameter(WEIGHT), there)
    assert [each.edit for each in model.applied_edits] == [edit, above][: 1 + later]
    edit.revert(model, force=True)
    if later:
        above.revert(model)
    assert not model.applied_edits
    if touch is not replaced:
        assert torch.equal(model.hf.get_parameter(WEIGHT), before)


def test_another_dtype_is_no_other_weight() -> None:
    model = fresh("gpt2")
    want = model.hf.get_parameter(WEIGHT).detach().bfloat16()
    edit = random_edit(model)
    edit.apply(model)
    model.hf.bfloat16()
    edit.revert(model)
    assert torch.equal(model.hf.get_parameter(WEIGHT), want)
