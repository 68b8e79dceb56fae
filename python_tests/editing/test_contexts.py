"""Generated contexts: seeded, usable as templates, as many as asked for."""

from __future__ import annotations

import pytest
import torch

from knowedit_ext.editing.contexts import STARTS, memit_contexts, rome_contexts
from knowedit_ext.editing.methods.rome import ROMEParams, rome
from knowedit_ext.editing.request import EditRequest

from ..support.unchanged import assert_unchanged, snapshot
from .models import editable
from .plain import moments_of


def test_seeded() -> None:
    model = editable("gpt2")
    before = snapshot(model.hf)
    first = rome_contexts(model, [(5, 3), (8, 2)], seed=3)
    assert first == rome_contexts(model, [(5, 3), (8, 2)], seed=3)
    assert first != rome_contexts(model, [(5, 3), (8, 2)], seed=4)
    assert memit_contexts(model, seed=3) == memit_contexts(model, seed=3) != memit_contexts(model, seed=4)
    assert_unchanged(before, model.hf)  # the global random state too


def test_the_bare_prompt_and_what_was_asked_for() -> None:
    model = editable("gpt2")
    contexts = rome_contexts(model, [(5, 3), (8, 2)])
    assert contexts[0] == "{}" and len(contexts) == 6
    assert all(context.endswith(". {}") and context.count("{}") == 1 for context in contexts[1:])
    lengths = [len(context.removesuffix(". {}").split()) for context in contexts[1:]]
    assert max(lengths[:3]) <= 5 and max(lengths[3:]) <= 8
    bare, generated = memit_contexts(model)
    assert bare == ["{}"] and len(generated) == len(STARTS)
    assert rome_contexts(model, []) == ["{}"]


def test_no_braces_from_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = editable("gpt2")
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids, **_: "a {} b { c }\n\nd")
    for context in [*rome_contexts(model, [(5, 2)])[1:], *memit_contexts(model)[1]]:
        assert context == "a b c d. {}"


def test_generated_when_not_given_and_kept_in_the_edit() -> None:
    model = editable("gpt2")
    params = ROMEParams(layers=(0,), v_num_grad_steps=2, context_template_length_params=((4, 2),))
    request, moments = EditRequest("w5 {} w9", "w3", "w20"), moments_of(model, [0])
    edit = rome(model, request, params, moments, seed=5)
    assert edit.contexts == rome_contexts(model, [(4, 2)], seed=5)
    again = rome(model, request, params, moments, contexts=edit.contexts)
    [name] = edit.changes
    assert torch.equal(edit.delta(name), again.delta(name))
