"""Edits by MEND and EFK against their plain definitions, for every family; and mistakes that must not go unseen."""

from __future__ import annotations

import copy

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editors.editor import LearnedEditor
from knowedit_ext.editors.mend import MEND

from ..editing.models import editable, fresh
from ..support.families import FAMILIES
from ..support.unchanged import assert_unchanged, snapshot
from .models import REQUESTS, efk_editor, mend_editor
from .plain import efk_deltas, mend_deltas


def names(editor: LearnedEditor) -> list[str]:
    return [weight.name for weight in editor.weights]


def apart(edit: ke.Edit, want: dict[str, torch.Tensor]) -> float:
    """The largest relative distance of a weight's change."""
    assert list(edit.changes) == list(want)
    return max(float((edit.delta(n) - delta).norm() / delta.norm()) for n, delta in want.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_mend_is_as_defined(family: str) -> None:
    model = fresh(family)
    editor = mend_editor(model)
    before = snapshot(model.hf)
    edits = [ke.mend(model, REQUESTS, editor), ke.mend(model, REQUESTS[0], editor, scale=0.5)]
    assert_unchanged(before, model.hf)
    tensors = editor.tensors
    assert apart(edits[0], mend_deltas(model, tensors, names(editor), REQUESTS)) < 1e-4
    alone = mend_deltas(model, tensors, names(editor), REQUESTS[:1])
    assert apart(edits[1], {name: 0.5 * delta for name, delta in alone.items()}) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_efk_is_as_defined(family: str) -> None:
    model = fresh(family)
    editor = efk_editor(model)
    before = snapshot(model.hf)
    edit = ke.efk(model, REQUESTS[0], editor)
    assert_unchanged(before, model.hf)
    assert apart(edit, efk_deltas(model, editor.tensors, names(editor), REQUESTS[0])) < 1e-4
    tokens = len(model.tokenizer("w5 w3 w7 w9 w10 w20 w23").input_ids)
    assert all(change.rank <= tokens + 1 for change in edit.changes.values())


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_reference_takes_own_statistics_and_deals_rates_out_in_the_models_order(family: str) -> None:
    model = fresh(family)
    editor = mend_editor(model)
    tensors = {name: x.clone() for name, x in editor.tensors.items()}
    edit = ke.mend(model, REQUESTS[0], editor, compat="reference")
    assert all(torch.equal(x, editor.tensors[name]) for name, x in tensors.items())  # the editor stays as it was
    again = mend_editor(model)
    for transform in again.network.mend.values():
        transform.k.fill_(float("nan"))
    order = [name for name, _ in model.hf.named_parameters() if name in names(editor)]
    with torch.no_grad():
        rates = editor.network.edit_lrs.clone()
        again.network.edit_lrs.copy_(torch.stack([rates[order.index(name)] for name in names(editor)]))
    want = _observing(model, again)
    assert apart(edit, want) < 1e-4
    assert (family == "gpt2") == (order != names(editor))


def _observing(model: ke.EditableModel, editor: MEND) -> dict[str, torch.Tensor]:
    """Rows counted weight by weight, each transformed by what was counted until then."""
    from .plain import rows_and_gradient

    deltas = {}
    for weight in editor.weights:
        inputs, gradients, _ = rows_and_gradient(model, REQUESTS[:1], [weight.name])[weight.name]
        kept = inputs.any(1) & gradients.any(1)
        editor.network.mend[weight.key].observe(inputs[kept], gradients[kept])
        deltas[weight.name] = mend_deltas(model, editor.tensors, names(editor), REQUESTS[:1])[weight.name]
    return deltas


def test_each_is_as_one_by_one(monkeypatch) -> None:
    model = editable("llama")
    editor = mend_editor(model)
    for rows in (4096, 1):  # in one pass, and each in its own
        monkeypatch.setattr("knowedit_ext.editors.apply.default_max_rows", lambda model, rows=rows: rows)
        for edit, request in zip(ke.mend_each(model, REQUESTS, editor), REQUESTS, strict=True):
            alone = ke.mend(model, request, editor)
            assert apart(edit, {name: alone.delta(name) for name in alone.changes}) < 1e-4
            assert [r["subject"] for r in edit.requests] == [request.subject]


MISTAKES = {
    "rows of zero gradient kept": lambda editor: setattr(
        editor, "counted_rows", lambda rows, weight: rows[weight.name]
    ),
    "rates swapped": lambda editor: editor.network.edit_lrs.data.copy_(editor.network.edit_lrs.data.flip(0)),
    "statistics not frozen at evaluation": lambda editor: editor.network.train(),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str) -> None:
    model = fresh("gpt2")
    editor = mend_editor(model)
    want = mend_deltas(model, editor.tensors, names(editor), REQUESTS)
    wrong = copy.copy(editor)
    wrong.network = copy.deepcopy(editor.network)
    MISTAKES[mistake](wrong)
    assert apart(ke.mend(model, REQUESTS, editor), want) < 1e-4 < 1e-2 < apart(ke.mend(model, REQUESTS, wrong), want)


def test_the_target_has_its_space() -> None:
    """ " w20" and "w20" are two requests to an editor, where the tokenizer tells them apart."""
    model = fresh("gpt2")
    editor = mend_editor(model)
    spelled = ke.mend(model, {"prompt": "w5 {} w9", "subject": "w3", "target_new": {"str": "w20"}}, editor)
    assert spelled.requests[0]["target_new"] == " w20"


def test_bad_input(tmp_path) -> None:
    model, other = fresh("gpt2"), fresh("llama")
    editor = mend_editor(model)
    with pytest.raises(ValueError, match="the editor is of another model .*type gpt2, here llama"):
        ke.mend(other, REQUESTS, editor)
    with pytest.raises(ValueError, match="no statistics of .* yet .0 rows counted.: train it first"):
        ke.mend(model, REQUESTS, ke.MEND.new(model, rank=3))
    with pytest.raises(ValueError, match="empty"):
        ke.mend(model, {"prompt": "w5 {}", "subject": "w3", "target_new": {"str": " "}}, editor)
    with pytest.raises(ValueError, match="no edit requests"):
        ke.mend(model, [], editor)
    with pytest.raises(ValueError, match="one fact at a time, got 3"):
        ke.efk(model, REQUESTS, efk_editor(model))
    with pytest.raises(ValueError, match=r"layer 4 is out of range: the model has layers 0\.\.3"):
        ke.MEND.new(model, [4])
    with pytest.raises(ValueError, match="scale"):
        ke.mend(model, REQUESTS, editor, scale=0.0)


@pytest.mark.parametrize("layers", [[], [1, 1]])
def test_layers_that_are_none(layers: list[int]) -> None:
    for kind in (ke.MEND, ke.EFK):
        with pytest.raises(ValueError, match="expected at least one, and none twice"):
            kind.new(fresh("gpt2"), layers)


@pytest.mark.parametrize("kind", ["mend", "efk"])
def test_a_model_of_the_same_kind_and_another_shape(kind: str) -> None:
    """Same type, layers and hidden size: the MLP, or the vocabulary, tells them apart."""
    make, edit = {"mend": (mend_editor, ke.mend), "efk": (efk_editor, ke.efk)}[kind]
    editor = make(fresh("llama"))
    with pytest.raises(ValueError, match="of another model .*gate_proj|of another model .*up_proj.* is .*, here"):
        edit(fresh("llama", intermediate_size=96), REQUESTS[0], editor)
    if kind == "efk":
        other = fresh("llama")
        other.hf.resize_token_embeddings(80)
        other = ke.load_model((other.hf, other.tokenizer))
        with pytest.raises(ValueError, match=r"its embedding is \[60, 32\], the model's \[80, 32\]"):
            ke.efk(other, REQUESTS[0], editor)


def test_many_and_none() -> None:
    model = fresh("gpt2")
    editor = mend_editor(model)
    assert ke.mend_each(model, [], editor) == []
    (one, other) = ke.mend_each(model, iter([REQUESTS[0], REQUESTS[0]]), editor)  # the same twice: each by itself
    assert all(torch.equal(one.delta(name), other.delta(name)) for name in one.changes)
    with one.applied(model), pytest.raises(ValueError, match="already applied"):
        other.apply(model)
    long = ke.EditRequest("{} " + "w9 " * 70 + "w10", "w3", "w20")
    with pytest.raises(ValueError, match="more than the model's 64 positions"):
        ke.mend_each(model, [REQUESTS[0], long], editor)
