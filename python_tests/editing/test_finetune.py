"""Fine-tuning against the published loop, written plainly: padded batches, the whole model, `torch.optim.Adam`."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

import knowedit_ext as ke
from knowedit_ext.editing.methods.finetune import FTParams, finetune, trained_weights
from knowedit_ext.editing.request import EditRequest
from knowedit_ext.world import load_world

from ..support.families import FAMILIES, tiny_hf
from ..support.tokenizers import word_level
from ..support.unchanged import assert_unchanged, snapshot
from .models import editable, fresh, unlikely
from .plain import down_projection, probability, spell, weight_name
from .test_beside import Int8Linear

# Prompts of different lengths, a prompt that lies in another, targets of different lengths, an unknown word.
REQUESTS = [
    EditRequest("w5 {} w9 w10", "w3 w7", "w20 w21"),
    EditRequest("w5 {}", "w3", "w22"),
    EditRequest("w17 w18 {} w9", "w33 w34 w35", "w40 what w41"),
]
BRIEF = FTParams(layers=(1,), num_steps=4, lr=5e-3, batch_size=2)
SURE = FTParams(layers=(1,), num_steps=40, lr=2e-2)


def log_probabilities(hf: nn.Module, rows: Sequence[list[int]]) -> torch.Tensor:
    """[rows, tokens, vocab] of a right-padded batch."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return hf(ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)


def plain_finetune(
    model: ke.EditableModel,
    requests: Sequence[EditRequest],
    params: FTParams,
    names: Sequence[str],
    published: bool,
    weight_decay: float = 0.0,
    alone: bool = False,
) -> dict[str, torch.Tensor]:
    """Changes by name. published: every target token is scored at the prompt's last token. alone: without padding."""
    hf, tokenizer = copy.deepcopy(model.hf), model.tokenizer
    weights = {name: hf.get_parameter(name) for name in names}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimiser = torch.optim.Adam(weights.values(), lr=params.lr, weight_decay=weight_decay)
    for _ in range(params.num_steps):
        losses = []
        for first in range(0, len(requests), params.batch_size):
            batch = requests[first : first + params.batch_size]
            prompts = [spell(model, request)[0] for request in batch]
            targets = [tokenizer(request.target_new).input_ids for request in batch]
            widest = max(map(len, targets))
            pad = tokenizer.pad_token_id
            rows = prompts if published else [p + t[:-1] for p, t in zip(prompts, targets, strict=True)]
            every = [log_probabilities(hf, [row])[0] for row in rows] if alone else log_probabilities(hf, rows)
            parts = []
            for row, prompt, target in zip(every, prompts, targets, strict=True):
                at = len(prompt) - 1
                if published:
                    padded = target + [pad] * (widest - len(target)) if pad is not None else target
                    parts.append(-row[at, [token for token in padded if token != tokenizer.unk_token_id]].mean())
                else:
                    parts.append(-torch.stack([row[at + n, token] for n, token in enumerate(target)]).mean())
            loss = torch.stack(parts).mean()
            losses += [float(loss.detach())] * len(batch)
            if loss >= 1e-2:
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            if params.norm_constraint is not None:
                with torch.no_grad():
                    for name, weight in weights.items():
                        most = params.norm_constraint
                        weight.copy_(torch.clamp(weight, before[name] - most, before[name] + most))
        if sum(losses) / len(losses) < 1e-2:
            break
    return {name: weight.detach() - before[name] for name, weight in weights.items()}


def assert_close(edit: ke.Edit, want: dict[str, torch.Tensor], tolerance: float) -> None:
    assert list(edit.changes) == list(want)
    for name, change in want.items():
        assert edit.delta(name).dtype == change.dtype and edit.delta(name).shape == change.shape
        assert change.abs().max() > 0
        assert (edit.delta(name) - change).norm() <= tolerance * change.norm(), name


def exact(family: str, **overrides) -> ke.EditableModel:
    """In float64, where rounding does not decide the sign of Adam's first steps."""
    model = fresh(family, **overrides)
    return ke.load_model((model.hf.double(), model.tokenizer))


def trained(model: ke.EditableModel, layers: Sequence[int], bias: bool) -> list[str]:
    """The down projections' parameters, as the model names them."""
    own = {
        id(p) for layer in layers for n, p in down_projection(model, layer).named_parameters() if bias or n != "bias"
    }
    return [name for name, parameter in model.hf.named_parameters() if id(parameter) in own]


# Where the model's own attention is computed in float32 whatever its weights are.
ROUNDING = {"gptj": 1e-5, "gemma2": 1e-4}


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_plain_loop(family: str, compat: str | None) -> None:
    model = exact(family)
    before = snapshot(model.hf)
    edit = finetune(model, REQUESTS, BRIEF, compat=compat)
    assert_unchanged(before, model.hf)
    names, alone = trained(model, [1], compat is not None), family == "gemma2"  # NaN at its padding, in float64
    want = plain_finetune(model, REQUESTS, BRIEF, names, compat is not None, alone=alone)
    assert_close(edit, want, ROUNDING.get(family, 1e-9))


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(layers=(0,)),
        dict(layers=(3,)),
        dict(layers=(0, 1, 2)),
        dict(batch_size=1),
        dict(batch_size=64),
        dict(norm_constraint=4e-3),
        dict(weight_decay=0.5),
    ],
)
def test_settings(changes: dict, compat: str | None) -> None:
    model, params = exact("gpt2"), replace(BRIEF, **changes)
    names = trained(model, params.layers, compat is not None)
    want = plain_finetune(model, REQUESTS, params, names, compat is not None, params.weight_decay)
    edit = finetune(model, REQUESTS, params, compat=compat)
    assert_close(edit, want, 1e-6)
    if params.norm_constraint:
        assert max(float(edit.delta(name).abs().max()) for name in names) <= params.norm_constraint * (1 + 1e-9)


@pytest.mark.parametrize("compat", [None, "reference"])
def test_in_float32(compat: str | None) -> None:
    model = editable("gpt2")
    names = trained(model, [1], compat is not None)
    want = plain_finetune(model, REQUESTS, BRIEF, names, compat is not None)
    assert_close(finetune(model, REQUESTS, BRIEF, compat=compat), want, 1e-3)


@pytest.mark.parametrize("padding", [None, "w0", "<s>"])
def test_published_padding(padding: str | None) -> None:
    """Padding counts unless it is the unknown token, as GPT-2's is."""
    tokenizer = word_level()
    if padding is not None:
        tokenizer.pad_token = padding
    model = ke.load_model((exact("gpt2").hf, tokenizer))
    want = plain_finetune(model, REQUESTS, replace(BRIEF, batch_size=3), trained(model, [1], True), True)
    edit = finetune(model, REQUESTS, replace(BRIEF, batch_size=3), compat="reference")
    assert_close(edit, want, 1e-6)
    ours = finetune(model, REQUESTS, BRIEF)
    plain = finetune(ke.load_model((model.hf, word_level())), REQUESTS, BRIEF)
    assert all(torch.equal(ours.delta(name), plain.delta(name)) for name in ours.changes)


def test_weight_decay_by_the_number_of_edits() -> None:
    """n^a e^b; the published code never applies it."""
    model, params = exact("gpt2"), replace(BRIEF, wd_power_law=(-0.5, -1.0))
    decay = 3**-0.5 * math.exp(-1.0)
    want = plain_finetune(model, REQUESTS, params, trained(model, [1], False), False, decay)
    assert_close(finetune(model, REQUESTS, params), want, 1e-6)
    ignored, without = (finetune(model, REQUESTS, p, compat="reference") for p in (params, BRIEF))
    assert all(torch.equal(ignored.delta(name), without.delta(name)) for name in without.changes)


@pytest.mark.parametrize(
    "template", ["transformer.h.{}", "transformer.h.{}.attn.c_attn", "transformer.h.{}.ln_1.weight"]
)
def test_other_modules(template: str) -> None:
    model, params = exact("gpt2"), replace(BRIEF, rewrite_module_tmp=template)
    every = [name for name, _ in model.hf.named_parameters() if template.format(1) in name]
    names = [name for name in every if not name.endswith("bias")]
    assert_close(finetune(model, REQUESTS, params), plain_finetune(model, REQUESTS, params, names, False), 1e-6)
    edit = finetune(model, REQUESTS, params, compat="reference")
    assert_close(edit, plain_finetune(model, REQUESTS, params, every, True), 1e-6)
    edit = finetune(model, REQUESTS, replace(params, bias=True))
    assert_close(edit, plain_finetune(model, REQUESTS, params, every, False), 1e-6)


def test_modules_by_substring_as_published() -> None:
    model = fresh("gpt2", n_layer=11)
    params = FTParams(layers=(1,), rewrite_module_tmp="transformer.h.{}", num_steps=1)
    layers = lambda compat: {int(name.split(".")[2]) for name in trained_weights(model, params, compat)}  # noqa: E731
    assert layers(None) == {1} and layers("reference") == {1, 10}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fact_goes_in_and_comes_out(family: str) -> None:
    model = editable(family)
    before, request = snapshot(model.hf), unlikely(model, "w17 w18 {}", "w33")
    assert probability(model, request) < 0.1
    edit = finetune(model, request, SURE)
    assert_unchanged(before, model.hf)
    with edit.applied(model):
        assert probability(model, request) > 0.9
        changed = [n for n, p in model.hf.named_parameters() if not torch.equal(p, before["parameters"][n][0])]
        assert changed == [weight_name(model, 1)] == list(edit.changes)
    assert_unchanged(before, model.hf)


def test_several_target_tokens() -> None:
    """The published loss cannot make the model say one token after the other."""
    model, request = editable("gpt2"), EditRequest("w17 {}", "w45 w46", "w12 w13 w14")
    with finetune(model, request, SURE).applied(model):
        assert probability(model, request) > 0.9
    with finetune(model, request, SURE, compat="reference").applied(model):
        assert probability(model, request) < 0.5


def test_nothing_to_learn_changes_nothing() -> None:
    model, request = fresh("gpt2"), unlikely(editable("gpt2"), "w17 w18 {}", "w33")
    finetune(model, request, SURE).apply(model)
    with pytest.warns(UserWarning, match="is already continued with"):
        again = finetune(model, request, replace(SURE, norm_constraint=1e-3))
    assert all(not again.delta(name).any() for name in again.changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_trained_in_float32(dtype: torch.dtype) -> None:
    model = ke.load_model((fresh("llama").hf.to(dtype), word_level()))
    before, request = snapshot(model.hf), unlikely(editable("llama"), "w17 w18 {}", "w33")
    edit = finetune(model, request, SURE)
    assert_unchanged(before, model.hf)
    [change] = edit.changes.values()
    assert change.dtype == torch.float32 and not torch.equal(change, change.to(dtype).float())
    with edit.applied(model):
        assert probability(model, request) > 0.9


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_left_as_found_when_stopped(kind: type[BaseException]) -> None:
    model, calls = fresh("gpt2"), []

    def stop(module: nn.Module, args: tuple) -> None:
        calls.append(bool(args[0].requires_grad))
        if sum(calls) == 3:  # the third pass that learns
            raise kind("on purpose")

    model.modules.layers[2].register_forward_pre_hook(stop)
    model.hf.train()
    model.modules.layers[0].eval()
    for parameter in list(model.hf.parameters())[::2]:
        parameter.requires_grad_(False)
    before = snapshot(model.hf)
    with pytest.raises(kind, match="on purpose"):
        finetune(model, REQUESTS, BRIEF)
    assert_unchanged(before, model.hf)
    assert sum(calls) == 3 and not model.__dict__.get("applied_edits")


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad])
def test_whatever_the_model_was_set_to(context) -> None:
    """Dropout is off, gradients are on, and the outcome repeats bit for bit."""
    model = fresh("gpt2")
    want = finetune(model, REQUESTS, BRIEF)
    model.hf.train().requires_grad_(False)
    before = snapshot(model.hf)
    with context():
        edit = finetune(model, REQUESTS, BRIEF)
    assert_unchanged(before, model.hf)
    assert all(torch.equal(edit.delta(name), want.delta(name)) for name in want.changes)


def test_what_it_was_made_from_is_kept(tmp_path) -> None:
    model = editable("gpt2")
    edit = finetune(model, REQUESTS, replace(BRIEF, wd_power_law=(-1.0, 0.0), norm_constraint=1e-3), compat="reference")
    assert edit.method == "ft-l" and edit.compat == "reference"
    assert [EditRequest.of(request) for request in edit.requests] == REQUESTS
    assert edit.model["type"] == "gpt2" and edit.model["layers"] == model.num_layers
    edit.save(tmp_path / "edit.safetensors")
    loaded = ke.Edit.load(tmp_path / "edit.safetensors")
    assert FTParams.from_dict(loaded.params) == FTParams.from_dict(edit.params)
    assert FTParams.from_dict(loaded.params).norm_constraint == 1e-3
    for name in edit.changes:
        assert torch.equal(loaded.delta(name), edit.delta(name))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(requests=[]), "no edit requests"),
        (dict(requests=[REQUESTS[1], replace(REQUESTS[1], target_new="w50")]), "contradictory requests"),
        (dict(requests=EditRequest("w5 {}", "w3 " * 70 + "w4", "w20")), "more than the model's 64 positions"),
        (dict(compat="ft"), "unknown compat 'ft': expected one of None, 'reference', 'hase'"),
        (dict(layers=(0, 7)), r"layer 7 is out of range: the model has layers 0..3"),
        (dict(layers=(-1,)), r"layers\[0\] is -1: expected at least 0"),
        (dict(kl_factor=0.1), "kl_factor is 0.1: fine-tuning has no such term"),
        (dict(rewrite_module_tmp="model.layers.{}.mlp"), "no weight 'model.layers.1.mlp...'"),
        (dict(requests=EditRequest("w5 {}", "w3", "what else"), compat="reference"), "has no known token"),
    ],
)
def test_bad_input_leaves_the_model_alone(changes: dict, message: str) -> None:
    model, changes = editable("gpt2"), dict(changes)
    requests, compat = changes.pop("requests", REQUESTS), changes.pop("compat", None)
    before = snapshot(model.hf)
    with pytest.raises(ValueError, match=message):
        finetune(model, requests, replace(BRIEF, **changes), compat=compat)
    assert_unchanged(before, model.hf)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    model = fresh("gpt2")
    with torch.no_grad():
        down_projection(model, 1).weight[3, 3] = bad
    with pytest.raises(ValueError, match="'transformer.h.1.mlp.c_proj.weight' holds NaN or infinite numbers"):
        finetune(model, REQUESTS, BRIEF)


def test_numbers_that_do_not_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    model = editable("gpt2")
    before = snapshot(model.hf)
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch .*: try a lower lr than 1e"):
        finetune(model, REQUESTS, replace(BRIEF, lr=1e36))
    spoil = lambda optimiser: optimiser.param_groups[0]["params"][0].data.fill_(math.inf)  # noqa: E731
    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    with pytest.raises(FloatingPointError, match="c_proj.weight' came to hold NaN or infinite numbers"):
        finetune(model, REQUESTS[0], replace(BRIEF, num_steps=1))
    assert_unchanged(before, model.hf)


@pytest.mark.parametrize("template", [None, "model.layers.{}", "model.layers.{}.mlp.down_proj"])
def test_quantised_weights_cannot_be_trained(template: str | None) -> None:
    hf = tiny_hf("llama")
    for layer in hf.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
    model = ke.load_model((hf, word_level()))
    with pytest.raises(
        ValueError, match=r"'model.layers.1.mlp.down_proj.weight' is quantised \(Tensor of torch.int8\)"
    ):
        finetune(model, REQUESTS, replace(BRIEF, rewrite_module_tmp=template))


def test_offloaded_weights_cannot_be_trained() -> None:
    model = fresh("llama")
    module = down_projection(model, 1)
    module.weight = nn.Parameter(module.weight.to("meta"))
    with pytest.raises(ValueError, match="'model.layers.1.mlp.down_proj.weight' is offloaded"):
        finetune(model, REQUESTS, BRIEF)


@pytest.mark.parametrize("name", ["world", "world/ft-l"])
def test_facts_of_the_world(name: str) -> None:
    world, params = load_world(), FTParams.preset(name)
    model = ke.load_model(world.folder)
    for record in world.records()[:40:20]:
        request = EditRequest.of(record)
        true = replace(request, target_new=request.target_true)
        assert probability(model, request) < probability(model, true)
        edit = finetune(model, record, params)
        with edit.applied(model):
            assert probability(model, request) > probability(model, true)
        [change] = edit.changes.values()
        assert (change.abs().max() <= 6e-3 * (1 + 1e-5)) == (name == "world/ft-l")
