"""Edits as data: exact bits on and off, files, sums, other models."""

from __future__ import annotations

import json
import logging
from itertools import permutations

import pytest
import torch
from safetensors.torch import save_file

import knowedit_ext as ke
from knowedit_ext.editing.edit import Edit, LowRank, weight_is_input_first
from knowedit_ext.editing.methods.memit import MEMITParams, memit
from knowedit_ext.editing.methods.rome import ROMEParams, rome
from knowedit_ext.editing.request import EditRequest

from ..support.families import WIDTH, tiny_hf
from ..support.tokenizers import word_level
from ..support.unchanged import assert_unchanged, snapshot
from .models import fresh
from .plain import down_projection, moments_of, weight_name

FAMILIES = ["gpt2", "llama"]
REQUEST = EditRequest("w5 {} w9", "w3 w7", "w20")


def random_edit(model: ke.EditableModel, layers=(0, 2), rank: int = 2, seed: int = 0, dense: bool = False) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    changes: dict[str, LowRank | torch.Tensor] = {}
    for layer in layers:
        module = down_projection(model, layer)
        first = weight_is_input_first(module)
        d_in, d_out = module.weight.shape if first else module.weight.shape[::-1]
        change = LowRank(random(d_in, rank), random(d_out, rank), first)
        changes[weight_name(model, layer)] = change.dense() if dense else change
    return Edit(changes, "random")


def bits(model: ke.EditableModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.hf.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_and_off(family: str, dense: bool, dtype: torch.dtype) -> None:
    model = ke.load_model((tiny_hf(family).to(dtype), word_level()))
    before, edit = snapshot(model.hf), random_edit(model, dense=dense)
    edit.apply(model)
    for name, parameter in model.hf.named_parameters():
        want = before["parameters"][name][0]
        if name in edit.changes:
            want = (want.double() + edit.delta(name)).to(dtype)  # summed in float64, rounded once
        assert torch.equal(parameter, want)
    edit.revert(model)
    assert_unchanged(before, model.hf)


def test_the_rounding_of_low_precision_weights_is_told(caplog) -> None:
    lost = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = ke.load_model((tiny_hf("gpt2").to(dtype), word_level()))
        edit = random_edit(model)
        shares = edit.rounding(model)
        with caplog.at_level(logging.INFO, "knowedit_ext"):
            edit.apply(model)
        assert list(shares) == [weight_name(model, 0), weight_name(model, 2)]
        lost[dtype] = max(shares.values())
    messages = [f"'{name}': bfloat16 takes {part:.2g} of the change" for name, part in shares.items()]
    assert [record.getMessage() for record in caplog.records] == messages
    assert lost[torch.float64] < 1e-14 < lost[torch.float32] < 1e-6 < 1e-4 < lost[torch.bfloat16] < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_methods_on_low_precision_models(family: str, dtype: torch.dtype) -> None:
    exact, rounded = fresh(family), fresh(family)
    moments = moments_of(exact, (0, 1))
    rounded.hf.to(dtype)
    before = snapshot(rounded.hf)
    settings = dict(v_num_grad_steps=4, v_lr=0.1)
    for method, params, contexts in (
        (rome, ROMEParams(layers=(0, 1), **settings), ["{}", "w11. {}"]),
        (memit, MEMITParams(layers=(0, 1), mom2_update_weight=10.0, **settings), [["{}"], ["w11. {}"]]),
    ):
        want, got = (method(model, REQUEST, params, moments, contexts=contexts) for model in (exact, rounded))
        assert_unchanged(before, rounded.hf)
        assert all(change.inputs.dtype == torch.float64 for change in got.changes.values())  # solved in float64
        for name in want.changes:
            assert (got.delta(name) - want.delta(name)).norm() < 0.3 * want.delta(name).norm()
        with got.applied(rounded):
            pass
        assert_unchanged(before, rounded.hf)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_interleaved_edits_come_off_in_any_order(order: tuple[int, ...]) -> None:
    model = fresh("gpt2")
    edits = [random_edit(model, layers, seed=n) for n, layers in enumerate([(0, 2), (0,), (1, 2)])]
    for edit in edits:
        edit.apply(model)
    left = list(edits)
    for number in order:
        edits[number].revert(model)
        left.remove(edits[number])
        got, alone = bits(model), fresh("gpt2")
        for edit in left:
            edit.apply(alone)
        assert same(got, bits(alone))  # as if the others had never been there
    assert same(bits(model), bits(fresh("gpt2")))


def test_applying_between_reverts() -> None:
    model, clean = fresh("gpt2"), bits(fresh("gpt2"))
    one, two = random_edit(model, seed=1), random_edit(model, seed=2)
    one.apply(model), two.apply(model), one.revert(model), one.apply(model), two.revert(model)
    alone = fresh("gpt2")
    one.apply(alone)
    assert same(bits(model), bits(alone))
    one.revert(model)
    assert same(bits(model), clean)


def test_applied_reverts_after_an_exception() -> None:
    model = fresh("gpt2")
    before, edit = snapshot(model.hf), random_edit(model)
    with pytest.raises(KeyError), edit.applied(model) as inside:
        assert inside is model
        raise KeyError
    assert_unchanged(before, model.hf)
    with pytest.raises(ValueError, match="this edit is not applied to this model"):
        edit.revert(model)


def test_twice_is_refused() -> None:
    model, other = fresh("gpt2"), fresh("gpt2")
    edit = random_edit(model)
    edit.apply(model)
    once = bits(model)
    with pytest.raises(ValueError, match="already applied to this model"):
        edit.apply(model)
    assert same(bits(model), once)
    edit.apply(other)  # of another model it is the first time
    assert same(bits(other), once)


def test_interrupted_while_it_is_applied() -> None:
    model = fresh("gpt2")
    before, edit = snapshot(model.hf), random_edit(model, layers=(0, 1, 2))

    class Interrupted(torch.Tensor):
        def to(self, *args, **kwargs):
            raise KeyboardInterrupt

    last = weight_name(model, 2)
    edit.changes[last] = torch.zeros_like(down_projection(model, 2).weight).detach().as_subclass(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        edit.apply(model)
    assert_unchanged(before, model.hf)
    with pytest.raises(ValueError, match="not applied"):
        edit.revert(model)


@pytest.mark.parametrize(
    "family, overrides, message",
    [
        ("llama", {}, r"the model has no parameter 'transformer.h.0.mlp.c_proj.weight': the edit was made for"),
        ("gpt2", dict(n_inner=48), r"'transformer.h.0.mlp.c_proj.weight' is \[48, 32\], the edit is for \[128, 32\]"),
        ("gpt2", dict(n_layer=2), r"the model has no parameter 'transformer.h.2.mlp.c_proj.weight'"),
    ],
)
def test_another_model_is_refused(family: str, overrides: dict, message: str) -> None:
    edit, other = random_edit(fresh("gpt2")), fresh(family, **overrides)
    before = snapshot(other.hf)
    with pytest.raises(ValueError, match=message):
        edit.apply(other)
    assert_unchanged(before, other.hf)


def test_delta_of_an_untouched_weight() -> None:
    with pytest.raises(KeyError, match="does not change 'lm_head.weight': it changes transformer.h.0"):
        random_edit(fresh("gpt2")).delta("lm_head.weight")


# -- files and sums --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family: str, dense: bool, tmp_path) -> None:
    model, file = fresh(family), tmp_path / "new" / "edit.safetensors"
    edit = random_edit(model, dense=dense)
    edit.requests, edit.params = [REQUEST.to_dict()], {"layers": [0, 2], "v_lr": 0.5}
    edit.contexts, edit.compat, edit.model = [["{}"], ["Côte. {}"]], "reference", {"name": "tiny"}
    edit.save(file)
    loaded = Edit.load(file)
    for name in ("method", "requests", "params", "contexts", "compat", "model"):
        assert getattr(loaded, name) == getattr(edit, name)
    assert list(loaded.changes) == list(edit.changes)
    for name in edit.changes:
        assert torch.equal(loaded.delta(name), edit.delta(name)) and loaded.delta(name).dtype == torch.float64
        assert isinstance(loaded.changes[name], torch.Tensor) == dense
    edit.apply(model)
    once = bits(model)
    edit.revert(model), loaded.apply(model)
    assert same(bits(model), once)
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no temporary file is left


def test_a_made_edit_keeps_all_through_a_file(tmp_path) -> None:
    model, file = fresh("gpt2"), tmp_path / "edit.safetensors"
    params = MEMITParams(layers=(0, 1), v_num_grad_steps=2)
    made = memit(model, REQUEST, params, moments_of(model, (0, 1)), contexts=[["{}"], ["w11. {}"]], compat="reference")
    made.save(file)
    loaded = Edit.load(file)
    assert MEMITParams.from_dict(loaded.params) == params
    assert [EditRequest.of(request) for request in loaded.requests] == [REQUEST]
    assert loaded.model == made.model and loaded.contexts == made.contexts and loaded.compat == "reference"


def test_broken_files_are_named(tmp_path) -> None:
    whole = tmp_path / "edit.safetensors"
    random_edit(fresh("gpt2")).save(whole)
    content = whole.read_bytes()
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        cut = tmp_path / f"cut{length}.safetensors"
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"cut{length}.safetensors' is not a whole safetensors file"):
            Edit.load(cut)
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="other.safetensors' is no saved edit"):
        Edit.load(other)
    described = json.dumps({"method": "x", "changes": {"a.weight": {}}})
    save_file({"x": torch.zeros(2)}, other, {"format": "knowedit_ext.edit.1", "edit": described})
    with pytest.raises(ValueError, match="other.safetensors' lacks part .*a.weight.dense"):
        Edit.load(other)
    save_file({"x": torch.zeros(2)}, other, {"format": "knowedit_ext.edit.1", "edit": "{"})
    with pytest.raises(ValueError, match="other.safetensors' has a broken description"):
        Edit.load(other)
    with pytest.raises(FileNotFoundError):
        Edit.load(tmp_path / "none.safetensors")


def test_merged() -> None:
    model = fresh("gpt2")
    low, more, dense = (
        random_edit(model, (0, 1), 1, 1),
        random_edit(model, (1, 2), 3, 2),
        random_edit(model, (2,), 1, 3),
    )
    dense.changes = {name: dense.delta(name) for name in dense.changes}
    dense.method, low.requests, more.requests = "other", [{"n": 1}], [{"n": 2}]
    merged = Edit.merge([low, more, dense])
    assert merged.requests == [{"n": 1}, {"n": 2}] and merged.method == "random+other"
    zero, one, two = (weight_name(model, layer) for layer in range(3))
    assert isinstance(merged.changes[one], LowRank) and merged.changes[one].inputs.shape[1] == 4
    assert torch.equal(merged.delta(zero), low.delta(zero))
    assert torch.allclose(merged.delta(one), low.delta(one) + more.delta(one), rtol=1e-12, atol=1e-12)
    assert torch.allclose(merged.delta(two), more.delta(two) + dense.delta(two), rtol=1e-12, atol=1e-12)
    merged.apply(model), merged.revert(model)
    assert same(bits(model), bits(fresh("gpt2")))


def test_what_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match="no edits to merge"):
        Edit.merge([])
    wide, narrow = random_edit(fresh("gpt2")), random_edit(fresh("gpt2", n_inner=WIDTH))
    with pytest.raises(ValueError, match="'transformer.h.0.mlp.c_proj.weight' in different shapes"):
        Edit.merge([wide, narrow])
