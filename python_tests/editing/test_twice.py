"""No edit is applied twice, whatever it comes through; what is applied is known to all that share a model."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.rows import EditedRows

from ..support.families import tiny_hf
from ..support.tokenizers import word_level
from .models import fresh
from .test_edit import bits, random_edit, same


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("through", ["itself", "list", "wrapper", "file", "merged", "merged later", "rows", "compiled"])
def test_no_edit_is_applied_twice(through: str, dense: bool, tmp_path) -> None:
    if dense and through == "rows":
        return
    model = fresh("gpt2")
    edit, other = random_edit(model, dense=dense), random_edit(model, seed=1, dense=dense)
    edit.save(tmp_path / "edit.safetensors")
    loaded = ke.Edit.load(tmp_path / "edit.safetensors")
    first, again = {
        "itself": (edit, lambda: edit.apply(model)),
        "list": (edit, lambda: [each.apply(model) for each in (other, edit)]),
        "wrapper": (edit, lambda: edit.apply(ke.load_model((model.hf, model.tokenizer)))),
        "file": (edit, lambda: loaded.apply(model)),
        "merged": (edit, lambda: ke.Edit.merge([other, loaded]).apply(model)),
        "merged later": (ke.Edit.merge([other, edit]), lambda: loaded.apply(model)),
        "rows": (edit, lambda: EditedRows(model, [other, edit])),
        "compiled": (edit, lambda: edit.apply(ke.load_model((torch.compile(model.hf), model.tokenizer)))),
    }[through]
    clean = bits(model)
    first.apply(model)
    once = bits(model)
    with pytest.raises(ValueError, match="already applied to this model"):
        again()
    if through == "list":
        other.revert(model)
    assert same(bits(model), once) and [each.edit for each in model.applied_edits] == [first]
    first.revert(model)
    assert same(bits(model), clean)


def test_an_edit_comes_off_through_another_wrapper_or_copy(tmp_path) -> None:
    model = fresh("gpt2")
    clean, edit = bits(model), random_edit(model)
    edit.save(tmp_path / "edit.safetensors")
    other = ke.load_model((model.hf, model.tokenizer), bos=True)
    edit.apply(model)
    edit.revert(other)
    assert same(bits(model), clean) and not model.applied_edits
    edit.apply(other)
    ke.Edit.load(tmp_path / "edit.safetensors").revert(model)
    assert same(bits(model), clean) and not other.applied_edits


@pytest.mark.parametrize("how", ["itself", "copy", "in a sum"])
def test_a_sum_holds_an_edit_once(how: str, tmp_path) -> None:
    model = fresh("gpt2")
    edit, other = random_edit(model), random_edit(model, seed=1)
    edit.save(tmp_path / "edit.safetensors")
    again = {
        "itself": edit,
        "copy": ke.Edit.load(tmp_path / "edit.safetensors"),
        "in a sum": ke.Edit.merge([other, edit]),
    }
    with pytest.raises(ValueError, match="an edit is twice among those to merge"):
        ke.Edit.merge([edit, again[how]])
    whole = ke.Edit.merge([edit, other])
    whole.save(tmp_path / "whole.safetensors")
    assert ke.Edit.load(tmp_path / "whole.safetensors").parts == whole.parts and len(whole.parts) == 2


def test_another_model_of_equal_weights_is_another_model() -> None:
    model, twin = fresh("gpt2"), fresh("gpt2")
    edit = random_edit(model)
    edit.apply(model), edit.apply(twin)
    edit.revert(model)
    assert twin.applied_edits and not model.applied_edits


def test_shared_state_goes_with_the_model() -> None:
    model = fresh("gpt2")
    random_edit(model).apply(model)
    ke.trace(model, ke.Fact("w5 {} w9", "w3 w7"), samples=1, noise=0.5)
    gone = weakref.ref(model.hf)
    del model
    gc.collect()
    assert gone() is None


# -- names -----------------------------------------------------------------------------------------------------------


def test_files_that_are_passed_on_tell_no_path(tmp_path) -> None:
    folder = tmp_path / "secret" / "my-model"
    tiny_hf("gpt2").save_pretrained(folder)
    word_level().save_pretrained(folder)
    model = ke.load_model(folder)
    edit = random_edit(model).bind(model)
    edit.save(tmp_path / "edit.safetensors")
    edit.to_peft(tmp_path / "adapter")
    old = ke.Edit(edit.changes, model={"name": str(folder)})  # of before
    old.to_peft(tmp_path / "old")
    assert edit.model["name"] == "my-model"
    for file in (tmp_path / "edit.safetensors", *(tmp_path / "adapter").iterdir(), *(tmp_path / "old").iterdir()):
        assert b"secret" not in file.read_bytes()
    for written in ("adapter", "old"):
        config = json.loads((tmp_path / written / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "my-model"
