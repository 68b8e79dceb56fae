"""MEMIT against its published insertion loop, on every family; behind a norm, that facts go in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from knowedit_ext.editing.methods.memit import MEMITParams, memit
from knowedit_ext.editing.request import EditRequest
from knowedit_ext.editing.tokenized import tokenize_requests
from knowedit_ext.editing.values import optimise_values

from ..support.families import FAMILIES, WIDTH
from ..support.unchanged import assert_unchanged, snapshot
from .models import editable, fresh, unlikely
from .plain import covariance, down_projection, moments_of, plain_memit, probability, weight_name

POST_NORM = ("gemma2", "gemma3", "gemma3_text", "olmo2")
PRE_NORM = [family for family in FAMILIES if family not in POST_NORM]
GROUPS = [["{}"], ["w11 w12. {}", "w13 w14 w15 w16. {}"]]
TAUGHT = [("w17 w18 {}", "w33"), ("w17 {}", "w45 w46"), ("w19 {}", "w35")]
REQUESTS = [
    EditRequest("w5 {} w9 w10", "w3 w7", "w20"),
    EditRequest("{} w9", "w33", "w22 w23"),
    EditRequest("w6 w8 w15 {}", "w30 w31 w32", "w25"),
]
PARAMS = MEMITParams(
    layers=(1, 2),
    v_num_grad_steps=60,
    v_weight_decay=0.0,
    kl_factor=0.0,
    clamp_norm_factor=1000.0,
    mom2_update_weight=1e-3,  # the tiny model's own keys hardly count
)
LAYERS = (0, 1, 2)
BRIEF = MEMITParams(layers=LAYERS, v_num_grad_steps=5, mom2_update_weight=30.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_go_in_and_come_out(family: str) -> None:
    model = editable(family)
    before, moments = snapshot(model.hf), moments_of(model, PARAMS.layers)
    requests = [unlikely(model, *taught) for taught in TAUGHT]
    assert all(probability(model, request) < 0.1 for request in requests)
    edit = memit(model, requests, PARAMS, moments, contexts=[["{}"]])
    assert_unchanged(before, model.hf)
    with edit.applied(model):
        assert all(probability(model, request) > 0.9 for request in requests)
        changed = [n for n, p in model.hf.named_parameters() if not torch.equal(p, before["parameters"][n][0])]
        assert changed == [weight_name(model, layer) for layer in PARAMS.layers]
    assert_unchanged(before, model.hf)


@pytest.mark.parametrize("site", ["gpt2", "gemma2"])
def test_the_models_last_layer(site: str) -> None:
    model, params = editable(site), replace(PARAMS, layers=(3,))
    request = unlikely(model, *TAUGHT[0])
    with memit(model, [request], params, moments_of(model, [3]), contexts=[["{}"]]).applied(model):
        assert probability(model, request) > 0.5


def test_refused_where_the_mlp_output_is_changed_otherwise() -> None:
    model = fresh("llama")
    model.modules.mlp(1).register_forward_hook(lambda module, args, output: output.tanh())
    with pytest.raises(ValueError, match=r"MEMIT is not defined for .* changes it otherwise.*; ROME works"):
        memit(model, REQUESTS, PARAMS, moments_of(model, PARAMS.layers))


@pytest.mark.parametrize("family", PRE_NORM)
def test_insertion_equals_the_published_loop(family: str) -> None:
    model = editable(family)
    # Where attention and MLP are parallel the first MLP reads embeddings: no more keys than words.
    layers = (1, 2) if family in ("gptj", "gpt_neox") else LAYERS
    values = 3 * torch.randn(len(REQUESTS), WIDTH, generator=torch.Generator().manual_seed(0))
    before = snapshot(model.hf)
    want = plain_memit(model, REQUESTS, layers, 30.0, covariance(model, layers), GROUPS, values)
    assert_unchanged(before, model.hf)
    edit = memit(
        model, REQUESTS, replace(BRIEF, layers=layers), moments_of(model, layers), contexts=GROUPS, values=values
    )
    assert list(edit.changes) == list(want)
    for name, change in want.items():
        assert (edit.delta(name) - change).norm() <= 1e-4 * change.norm()


@pytest.mark.parametrize("size, family", [("n_inner", "gpt2"), ("intermediate_size", "llama")])
def test_square_weights(size: str, family: str) -> None:
    model = fresh(family, **{size: WIDTH})
    values = torch.randn(len(REQUESTS), WIDTH, generator=torch.Generator().manual_seed(0))
    want = plain_memit(model, REQUESTS, LAYERS, 30.0, covariance(model, LAYERS), GROUPS, values)
    edit = memit(model, REQUESTS, BRIEF, moments_of(model, LAYERS), contexts=GROUPS, values=values)
    for name, change in want.items():
        assert change.shape == (WIDTH, WIDTH)
        assert (edit.delta(name) - change).norm() <= 1e-4 * change.norm()


def test_values_are_optimised_at_the_last_layer() -> None:
    model = editable("llama")
    moments = moments_of(model, LAYERS)
    requests = tokenize_requests(model, REQUESTS, [c for group in GROUPS for c in group], "subject_last")
    values = optimise_values(model, requests, BRIEF, "layer", LAYERS[-1]).values
    own = memit(model, REQUESTS, BRIEF, moments, contexts=GROUPS)
    given = memit(model, REQUESTS, BRIEF, moments, contexts=GROUPS, values=values)
    for name in own.changes:
        assert torch.equal(own.delta(name), given.delta(name))


def test_keys_of_earlier_edits_keep_their_values() -> None:
    model = fresh("gpt2")
    moments, matrices = moments_of(model, LAYERS), covariance(model, LAYERS)
    first, second = REQUESTS[:2], REQUESTS[2:]
    values = 3 * torch.randn(len(REQUESTS), WIDTH, generator=torch.Generator().manual_seed(0))
    earlier = memit(model, first, BRIEF, moments, contexts=GROUPS, values=values[:2])
    with earlier.applied(model):
        want = plain_memit(model, second, LAYERS, 30.0, matrices, GROUPS, values[2:], kept=first)
        later = memit(model, second, BRIEF, moments, contexts=GROUPS, values=values[2:], earlier=[earlier])
        free = memit(model, second, BRIEF, moments, contexts=GROUPS, values=values[2:])
    for name, change in want.items():
        assert (later.delta(name) - change).norm() <= 1e-4 * change.norm()
        assert (free.delta(name) - change).norm() > 1e-3 * change.norm()


@pytest.mark.parametrize("broken", [1, 3])
def test_left_as_found_after_an_exception(broken: int) -> None:
    model = fresh("gpt2")
    moments, weight = moments_of(model, LAYERS), down_projection(model, 0).weight
    original = weight.detach().clone()

    def fail(module: torch.nn.Module, args: tuple) -> None:  # once the first layer is edited
        if broken < 3 and not torch.equal(weight, original):
            raise RuntimeError("broken on purpose")
        if broken == 3 and torch.is_grad_enabled():  # while values are optimised
            raise RuntimeError("broken on purpose")

    model.modules.layers[broken].register_forward_pre_hook(fail)
    before = snapshot(model.hf)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        memit(model, REQUESTS, BRIEF, moments, contexts=GROUPS)
    assert_unchanged(before, model.hf)
    assert not model.__dict__.get("applied_edits")


def test_what_it_was_made_from_is_kept() -> None:
    model = editable("gpt2")
    edit = memit(model, REQUESTS, replace(BRIEF, v_num_grad_steps=1), moments_of(model, LAYERS), contexts=GROUPS)
    assert edit.method == "memit" and edit.contexts == GROUPS
    assert [EditRequest.of(request) for request in edit.requests] == REQUESTS
    assert MEMITParams.from_dict(edit.params) == replace(BRIEF, v_num_grad_steps=1)
