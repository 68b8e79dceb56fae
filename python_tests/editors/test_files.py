"""Editors as files: their own, released ones, and what is none."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

import knowedit_ext as ke

from ..editing.models import fresh
from .models import REQUESTS, efk_editor, mend_editor

MAKE = {"mend": mend_editor, "efk": efk_editor}
KINDS = {"mend": ke.MEND, "efk": ke.EFK}


def made(kind: str, model: ke.EditableModel, editor) -> ke.Edit:
    return ke.mend(model, REQUESTS, editor) if kind == "mend" else ke.efk(model, REQUESTS[0], editor)


def equal(one: ke.Edit, other: ke.Edit) -> bool:
    return one.changes.keys() == other.changes.keys() and all(
        torch.equal(one.delta(name), other.delta(name)) for name in one.changes
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_saved_and_loaded(kind: str, family: str, tmp_path) -> None:
    model = fresh(family)
    editor = MAKE[kind](model)
    editor.save(tmp_path / "e.safetensors")
    again = KINDS[kind].load(tmp_path / "e.safetensors", model)
    assert again.layers == [1, 3] and again.tensors.keys() == editor.tensors.keys()
    assert equal(made(kind, model, editor), made(kind, model, again))
    with pytest.raises(ValueError, match="it is an editor of"):
        KINDS["efk" if kind == "mend" else "mend"].load(tmp_path / "e.safetensors", model)
    with pytest.raises(ValueError, match="is no .* editor for .*no MLP projection|is no .* editor for"):
        KINDS[kind].load(tmp_path / "e.safetensors", fresh("llama"))


@pytest.mark.parametrize("kind", KINDS)
def test_released_archives(kind: str, tmp_path) -> None:
    """As mend's trainer saves them: its config, optimisers and all; older ones with "gtn." for "mend."."""
    model = fresh("gpt2")
    editor = MAKE[kind](model, layers=(1, 2, 3))
    state = {name.replace("mend.", "gtn.", 1): x for name, x in editor.tensors.items()}
    config = GPT2Config(n_layer=4, n_embd=32, n_head=4, vocab_size=60)
    archive = {"model": {**state, "model_config": config}, "opt": {"state": {}}, "lr_opt": None, "step": 7}
    torch.save(archive, tmp_path / "a.pt")
    about = ke.convert_editor(tmp_path / "a.pt", tmp_path / "e.safetensors")
    assert about["method"] == kind
    again = KINDS[kind].load(tmp_path / "e.safetensors", model)
    assert equal(made(kind, model, editor), made(kind, model, again))
    bare = load_file(tmp_path / "e.safetensors")  # without metadata: the last layers, and what tensors are called
    save_file(bare, tmp_path / "bare.safetensors")
    assert KINDS[kind].load(tmp_path / "bare.safetensors", model).layers == [1, 2, 3]


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


@pytest.mark.parametrize(
    "archive, message",
    [
        ({"model": {"edit_lrs": torch.ones(2)}}, "does not say which model it is for"),
        ({"model": {"model_config": GPT2Config()}}, "tensors of no editor"),
        ({"opt": {}}, "has no 'model'"),
        ([1], "has no 'model'"),
        ({"model": {"model_config": GPT2Config(), "edit_lrs": 3.0}}, "which is no tensor"),
        ({"model": Bomb()}, "is no archive of tensors"),
    ],
)
def test_what_is_no_archive(archive, message: str, tmp_path, capsys) -> None:
    torch.save(archive, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        ke.convert_editor(tmp_path / "a.pt", tmp_path / "e.safetensors")
    assert not (tmp_path / "e.safetensors").exists() and "boom" not in capsys.readouterr().out


def test_vocabulary_with_one_row_more(tmp_path) -> None:
    """Released files were made with a padding token of their own."""
    model = fresh("gpt2")
    editor = efk_editor(model)
    tensors, name = editor.tensors, "editor.condition.embedding.weight"
    for rows, fits in ((61, True), (62, False), (59, False)):
        padded = torch.cat([tensors[name], tensors[name][:2]])[:rows].clone()
        save_file({**tensors, name: padded}, tmp_path / "e.safetensors")
        if fits:
            assert equal(made("efk", model, editor), made("efk", model, ke.EFK.load(tmp_path / "e.safetensors", model)))
        else:
            with pytest.raises(ValueError, match="its embedding is .* one row more is allowed"):
                ke.EFK.load(tmp_path / "e.safetensors", model)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_do_not_fit(kind: str, tmp_path) -> None:
    model = fresh("gpt2")
    tensors = MAKE[kind](model, layers=(1, 2, 3)).tensors
    path = tmp_path / "e.safetensors"
    for name in tensors:
        save_file({n: x for n, x in tensors.items() if n != name}, path)
        with pytest.raises(ValueError, match=rf"'{path}' is no {kind} editor for"):
            KINDS[kind].load(path, model)
        save_file({**tensors, name: torch.cat([tensors[name], tensors[name]])}, path)
        with pytest.raises(ValueError, match=rf"'{path}' is no {kind} editor for"):
            KINDS[kind].load(path, model)
    save_file({**tensors, "more": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="it has an unknown 'more'"):
        KINDS[kind].load(path, model)
