"""Keys against a plain hooked forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.keys import KeyRows
from knowedit_ext.editing.params import FACT_TOKENS
from knowedit_ext.editing.request import EditRequest
from knowedit_ext.editing.tokenized import context_weights, tokenize_requests
from knowedit_ext.editing.values import optimise_values

from ..support.families import FAMILIES, tiny_model
from .plain import plain_group_key, plain_key

GROUPS = [["{}"], ["w11 w12. {}", "w13 w14 w15 w16. {}", "{} w50"]]
REQUESTS = [
    EditRequest("w5 {} w9 w10", "w3 w7", "w20"),
    EditRequest("{} w9", "w33", "w22"),
    EditRequest("w6 w8 w15 {} w41", "w30 w31 w32", "w25"),
]
LAYER = 2


def keys_of(model: ke.EditableModel, requests, groups=GROUPS, fact_token="subject_last"):
    flat = [context for group in groups for context in group]
    rows = KeyRows(model, tokenize_requests(model, requests, flat, fact_token), context_weights(groups))
    inputs, outputs = rows.pass_through(rows.start, 0, LAYER, LAYER, "mlp")
    return rows, inputs, outputs


@pytest.mark.parametrize("fact_token", FACT_TOKENS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_a_forward_pass(family: str, fact_token: str) -> None:
    model = tiny_model(family)
    _, inputs, outputs = keys_of(model, REQUESTS, fact_token=fact_token)
    pairs = [(request, context) for request in REQUESTS for group in GROUPS for context in group]
    assert len(inputs) == len(outputs) == len(pairs)
    for row, (request, context) in enumerate(pairs):
        key, value = plain_key(model, request, context, LAYER, fact_token)
        assert torch.allclose(inputs[row], key, rtol=0, atol=1e-5 * float(key.abs().max()))
        assert torch.allclose(outputs[row], value, rtol=0, atol=1e-5 * float(value.abs().max()))


def test_groups_weigh_the_same() -> None:
    model = tiny_model("gpt2")
    rows, inputs, _ = keys_of(model, REQUESTS)
    for request, key in zip(REQUESTS, rows.mean(inputs), strict=True):
        assert key.dtype == torch.float64
        assert torch.allclose(key, plain_group_key(model, request, GROUPS, LAYER), rtol=1e-4, atol=1e-6)


def test_runs_on_from_a_middle_layer() -> None:
    rows, inputs, outputs = keys_of(tiny_model("llama"), REQUESTS)
    hidden = rows.run(rows.start, 0, LAYER)
    again, reached = rows.pass_through(hidden, LAYER, LAYER, LAYER + 1, "layer")
    assert torch.equal(again, inputs)
    assert torch.equal(rows.pass_through(hidden, LAYER, LAYER, LAYER, "mlp")[1], outputs)
    [(_, lookups)], [behind] = rows.parts, rows.run(rows.start, 0, LAYER + 2)
    assert torch.equal(reached, behind[lookups])


def test_rows_held_at_once_change_nothing_but_rounding() -> None:
    model = tiny_model("mistral")
    requests = tokenize_requests(model, REQUESTS, [c for group in GROUPS for c in group], "subject_last")
    whole = KeyRows(model, requests, context_weights(GROUPS))
    parts = KeyRows(model, requests, context_weights(GROUPS), max_rows=7)
    assert len(whole.parts) == 1 and len(parts.parts) > 3
    both = [rows.pass_through(rows.run(rows.start, 0, 1), 1, LAYER, LAYER, "mlp") for rows in (whole, parts)]
    for one, other in zip(*both, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("batch", [None, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_beside_values_are_those_of_a_pass_of_their_own(family: str, batch: int | None) -> None:
    model, params = tiny_model(family), ke.ROMEParams(layers=(LAYER,), v_num_grad_steps=2)
    noisy = replace(REQUESTS[1], noise=ke.SubjectNoise(0.2, samples=2))
    requests = tokenize_requests(model, [*REQUESTS, noisy], [c for g in GROUPS for c in g], "subject_last")
    rows = KeyRows(model, requests, context_weights(GROUPS))
    inputs, outputs = rows.pass_through(rows.start, 0, LAYER, LAYER, "mlp")
    values = optimise_values(model, requests, params, "mlp", LAYER, batch, keys=True)
    for got, want in ((values.keys, inputs), (values.outputs, outputs)):
        assert got.shape == want.shape
        assert torch.allclose(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert optimise_values(model, requests[:1], params, "mlp", LAYER).keys is None


@pytest.mark.parametrize("prompt, context", [("w3 w7 w5 {} w9", "{}"), ("w5 {} w9", "w3 w7 w3 w7. {}")])
def test_the_subject_in_the_braces_is_meant(prompt: str, context: str) -> None:
    model, request = tiny_model("gpt2"), EditRequest(prompt, "w3 w7", "w20")
    _, inputs, _ = keys_of(model, [request], [["{}"], [context]])
    assert torch.allclose(inputs[1], plain_key(model, request, context, LAYER)[0], atol=1e-5)


def test_nothing_after_the_subject() -> None:
    with pytest.raises(ValueError, match="'subject_first_after_last': nothing follows the subject in 'w5 w3'"):
        keys_of(tiny_model("gpt2"), [EditRequest("w5 {}", "w3", "w20")], [["{}"]], "subject_first_after_last")
