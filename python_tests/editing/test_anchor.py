"""The norm anchor: what the MLP is made to put out has the given length, in its direction; nothing else differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.anchor import anchored
from knowedit_ext.editing.tokenized import tokenize_requests
from knowedit_ext.editing.values import optimise_values

from .models import editable, fresh
from .plain import moments_of, plain_key
from .test_values import CONTEXTS, PARAMS, REQUESTS


def v0_of(model: ke.EditableModel) -> torch.Tensor:
    return torch.stack([plain_key(model, request, "{}", 1)[1] for request in REQUESTS])


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("site", ["layer", "mlp"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_values_are_rescaled(family: str, site: str, compat: str | None) -> None:
    """compute_z.py:206-231 of NAS: v* = v0 + delta to the anchor's length; as released too long a v* is given up."""
    model = editable(family)
    tokenized = tokenize_requests(model, REQUESTS, CONTEXTS, "subject_last")
    optimised = optimise_values(model, tokenized, PARAMS, site, 1)
    v0 = v0_of(model)
    v = v0 + optimised.values - optimised.initial
    anchor = float(v.norm(dim=1).median()) / (2.1 if site == "layer" else 5.1)  # half of them too long
    got = anchored(model, tokenized, replace(PARAMS, norm_anchor=anchor), optimised, site, 1, compat)
    for number in range(len(REQUESTS)):
        length = v[number].norm()
        scaled = v[number] * anchor / length
        if compat == "reference" and length > {"layer": 2, "mlp": 5}[site] * anchor:
            scaled = v0[number]
        want = optimised.initial[number] - v0[number] + scaled
        assert torch.allclose(got[number], want, atol=1e-4 * float(v.abs().max()))
    assert torch.equal(anchored(model, tokenized, PARAMS, optimised, site, 1, compat), optimised.values)


@pytest.mark.parametrize("name", ["rome", "memit", "pmet"])
def test_methods_take_it(name: str) -> None:
    model, method = fresh("llama"), ke.METHODS[name]
    params = replace(method.params_of("world"), layers=(1,), v_num_grad_steps=3, clamp_norm_factor=2.0)
    options = dict(moments=moments_of(model, (1,)), contexts=CONTEXTS if name == "rome" else [CONTEXTS])
    plain, other, long = (
        ke.edit(model, REQUESTS[0], name, params=replace(params, norm_anchor=anchor), **options)
        for anchor in (None, 1.0, 1e3)
    )
    sizes = [edit.delta(next(iter(edit.changes))).norm() for edit in (plain, other, long)]
    assert sizes[2] > 10 * max(sizes[:2]) and sizes[0] != sizes[1]


def test_the_anchor_of_a_model() -> None:
    model = fresh("gpt2")
    params = replace(PARAMS, v_num_grad_steps=3)
    requests = [ke.EditRequest("w5 {} w9", f"w{n}", "w20") for n in range(10, 50)]
    norm = ke.value_norm(model, requests, params)
    optimised = optimise_values(model, tokenize_requests(model, requests, ["{}"], "subject_last"), params, "layer", 1)
    v0 = torch.stack([plain_key(model, request, "{}", 1)[1] for request in requests])
    assert norm == pytest.approx(
        float((v0 + optimised.values - optimised.initial).norm(dim=1).sort().values[:38].mean()), rel=1e-4
    )
    edit = ke.rome(model, requests[0], ke.ROMEParams(layers=(1,), v_num_grad_steps=2, mom2_adjustment=False))
    with edit.applied(model), pytest.raises(ValueError, match="the unedited model's: 1 edits are applied"):
        ke.value_norm(model, requests, params)
