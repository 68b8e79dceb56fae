"""Edits that are not sound are refused at every door, before any weight is touched; none is applied twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import knowedit_ext as ke
from knowedit_ext.editing.changes import LowRank
from knowedit_ext.editing.rows import EditedRows

from ..support.families import WIDTH, tiny_hf
from ..support.tokenizers import word_level
from ..support.unchanged import assert_unchanged, snapshot
from .models import fresh
from .plain import weight_name
from .test_edit import bits, random_edit, same

WIDE = 4 * WIDTH
KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BAD_NUMBERS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
BAD_TENSORS: dict[str, Callable[[tuple[int, ...]], object]] = {
    "bool": lambda shape: torch.ones(shape, dtype=torch.bool),
    "int8": lambda shape: torch.ones(shape, dtype=torch.int8),
    "int64": lambda shape: torch.ones(shape, dtype=torch.int64),
    "complex": lambda shape: torch.ones(shape, dtype=torch.complex64),
    "float8": lambda shape: torch.ones(shape).to(torch.float8_e4m3fn),
    "sparse": lambda shape: torch.ones(shape).to_sparse(),
    "meta": lambda shape: torch.ones(shape, device="meta"),
    "numpy": np.ones,
    "list": lambda shape: [1.0],
    "number": lambda shape: 1.0,
    "none": lambda shape: None,
} | {name: lambda shape, value=value: _with(shape, value) for name, value in BAD_NUMBERS.items()}


def _with(shape: tuple[int, ...], value: float) -> torch.Tensor:
    tensor = torch.ones(shape)
    tensor[(-1,) * len(shape)] = value
    return tensor


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_tensors_make_no_edit(kind: str) -> None:
    make = BAD_TENSORS[kind]
    with pytest.raises((ValueError, TypeError), match="the change of 'a.weight'"):
        ke.Edit({"a.weight": make((3, 4))})
    for inputs, outputs in ((make((3, 1)), torch.ones(4, 1)), (torch.ones(3, 1), make((4, 1)))):
        with pytest.raises((ValueError, TypeError), match="the factor `(inputs|outputs)` of a low-rank change"):
            LowRank(inputs, outputs, True)


@pytest.mark.parametrize("inputs", [(3,), (3, 1, 1), (3, 0), (0, 1), (3, 2), ()])
@pytest.mark.parametrize("outputs", [(4,), (4, 1, 1), (4, 0), (0, 1), (4, 3), ()])
def test_factors_are_matrices_of_one_rank(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rank"):
        LowRank(torch.ones(inputs), torch.ones(outputs), False)


@pytest.mark.parametrize("order", [None, 1, "yes", torch.tensor(True)])
def test_an_order_is_true_or_false(order: object) -> None:
    with pytest.raises(TypeError, match="input_first"):
        LowRank(torch.ones(3, 1), torch.ones(4, 1), order)


@pytest.mark.parametrize("name", [None, 3, ("a", "b")])
def test_changes_go_by_names(name: object) -> None:
    with pytest.raises(TypeError, match="names of weights"):
        ke.Edit({name: torch.ones(2)})


@pytest.mark.parametrize("changes", [None, [1], "x", torch.ones(2)])
def test_changes_are_a_mapping(changes: object) -> None:
    with pytest.raises(TypeError, match="changes are a .*expected {name of a weight"):
        ke.Edit(changes)


# What can be done with an edit: each looks before it does anything.
DOORS: dict[str, Callable] = {
    "apply": lambda edit, model, folder: edit.apply(model),
    "applied": lambda edit, model, folder: edit.applied(model).__enter__(),
    "rounding": lambda edit, model, folder: edit.rounding(model),
    "rows": lambda edit, model, folder: EditedRows(model, [random_edit(model, seed=9), edit]),
    "save": lambda edit, model, folder: edit.save(folder / "edit.safetensors"),
    "merge": lambda edit, model, folder: ke.Edit.merge([random_edit(model, seed=9), edit]),
    "to_peft": lambda edit, model, folder: edit.to_peft(folder),
}
WITH_MODEL = ("apply", "applied", "rounding", "rows")


@pytest.mark.parametrize("value", BAD_NUMBERS.values(), ids=BAD_NUMBERS)
@pytest.mark.parametrize("door", DOORS)
def test_numbers_that_went_bad_later(door: str, value: float, tmp_path) -> None:
    """A tensor may be written to after the edit was made. The second weight's is: the first is not touched either."""
    model = fresh("gpt2")
    before = snapshot(model.hf)
    for side in ("inputs", "outputs"):
        edit = random_edit(model)
        getattr(edit.changes[weight_name(model, 2)], side)[1, 0] = value
        with pytest.raises(ValueError, match="transformer.h.2.mlp.c_proj.weight.* NaN or infinite"):
            DOORS[door](edit, model, tmp_path)
    assert_unchanged(before, model.hf)
    assert not model.applied_edits and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [kind for kind in BAD_TENSORS if kind not in BAD_NUMBERS])
@pytest.mark.parametrize("door", DOORS)
def test_tensors_that_were_put_in_later(door: str, kind: str, tmp_path) -> None:
    model = fresh("gpt2")
    before, edit = snapshot(model.hf), random_edit(model, dense=door != "rows")
    edit.changes[weight_name(model, 2)] = BAD_TENSORS[kind]((WIDE, WIDTH))
    with pytest.raises((ValueError, TypeError), match="the change of 'transformer.h.2.mlp.c_proj.weight'|dense tensor"):
        DOORS[door](edit, model, tmp_path)
    assert_unchanged(before, model.hf)
    assert not model.applied_edits and not list(tmp_path.iterdir())


def wrong_sides(change: LowRank) -> dict[str, LowRank | torch.Tensor]:
    inputs, outputs = change.inputs, change.outputs
    return {
        "short inputs": LowRank(inputs[1:], outputs, change.input_first),
        "long outputs": LowRank(inputs, torch.cat([outputs, outputs[:1]]), change.input_first),
        "turned": LowRank(outputs, inputs, change.input_first),
        "wrong order": LowRank(inputs, outputs, not change.input_first),
        "vector": change.dense()[0],
        "cube": change.dense()[None],
        "transposed": change.dense().T,
        "short": change.dense()[:, 1:],
        "scalar": torch.tensor(1.0),
    }


@pytest.mark.parametrize("kind", wrong_sides(LowRank(torch.ones(3, 1), torch.ones(2, 1), True)))
@pytest.mark.parametrize("door", WITH_MODEL)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_wrong_shapes(family: str, door: str, kind: str, tmp_path) -> None:
    model = fresh(family)
    before, edit, name = snapshot(model.hf), random_edit(model), weight_name(model, 2)
    edit.changes[name] = wrong_sides(edit.changes[name])[kind]
    with pytest.raises(ValueError, match="another model's|dense tensor"):
        DOORS[door](edit, model, tmp_path)
    assert_unchanged(before, model.hf)


@pytest.mark.parametrize("door", WITH_MODEL)
def test_a_square_weight_taken_the_wrong_way_round(door: str, tmp_path) -> None:
    model = fresh("llama")
    before, name = snapshot(model.hf), "model.layers.0.self_attn.o_proj.weight"
    edit = ke.Edit({name: LowRank(torch.ones(WIDTH, 1), torch.ones(WIDTH, 1), True)})
    with pytest.raises(ValueError, match=r"'.*o_proj.weight' the wrong way round: it is \[d_out, d_in\]"):
        DOORS[door](edit, model, tmp_path)
    assert_unchanged(before, model.hf)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("door", WITH_MODEL)
def test_changes_beyond_the_weights_type(door: str, dtype: torch.dtype, low_rank: bool, tmp_path) -> None:
    """A change that fits by itself and not in the sum; what just fits is taken."""
    if dtype == torch.float64 or (door == "rows" and not low_rank):
        return
    model = ke.load_model((tiny_hf("llama").to(dtype), word_level()))
    most, name = torch.finfo(dtype).max, weight_name(model, 2)
    with torch.no_grad():
        model.hf.get_parameter(name)[3, 5] = 0.75 * most
    before, edit = snapshot(model.hf), random_edit(model, dense=not low_rank)
    for share, sound in ((0.2, True), (0.5, False)):
        inputs, outputs = (torch.zeros(d, 1, dtype=torch.float64) for d in model.hf.get_parameter(name).shape[::-1])
        inputs[5], outputs[3] = share, most
        change = LowRank(inputs, outputs, False)
        edit.changes[name] = change if low_rank else change.dense()
        if sound:
            if door != "applied":
                DOORS[door](edit, model, tmp_path)
            if door == "apply":
                wanted = before["parameters"][name][0][3, 5].double() + edit.delta(name)[3, 5]
                assert model.hf.get_parameter(name)[3, 5] == wanted.to(dtype)
                edit.revert(model)
        else:
            with pytest.raises(
                ValueError, match=f"the change of '{name}' is too large: .* beyond what {str(dtype)[6:]}"
            ):
                DOORS[door](edit, model, tmp_path)
    assert_unchanged(before, model.hf)


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(1e-3, 1e9),
    at=st.integers(0, WIDE * WIDTH - 1),
    seed=st.integers(0, 5),
    dtype=st.sampled_from(KINDS),
)
def test_no_weight_ever_holds_infinity(scale: float, at: int, seed: int, dtype: torch.dtype) -> None:
    """Refused exactly where the sum, rounded once, is not finite."""
    model = ke.load_model((tiny_hf("gpt2").to(dtype), word_level()))
    name = weight_name(model, 1)
    before = snapshot(model.hf)
    edit = random_edit(model, (1,), seed=seed, dense=True)
    edit.changes[name] = edit.changes[name].float()
    edit.changes[name].view(-1)[at] = scale
    wanted = (model.hf.get_parameter(name).double() + edit.changes[name].double()).to(dtype)
    if wanted.isfinite().all():
        with edit.applied(model):
            assert torch.equal(model.hf.get_parameter(name), wanted)
    else:
        with pytest.raises(ValueError, match="too large"):
            edit.apply(model)
    assert_unchanged(before, model.hf)


def test_weights_that_are_not_finite_are_named() -> None:
    model = fresh("gpt2")
    with torch.no_grad():
        model.hf.get_parameter(weight_name(model, 2))[0, 0] = float("inf")
    before = bits(model)
    with pytest.raises(ValueError, match=f"'{weight_name(model, 2)}' holds NaN or infinite"):
        random_edit(model).apply(model)
    assert same(before, bits(model))


@pytest.mark.parametrize("dense", [False, True])
def test_a_change_that_rounding_takes_away_whole(dense: bool) -> None:
    model = ke.load_model((tiny_hf("gpt2").to(torch.bfloat16), word_level()))
    before, edit = snapshot(model.hf), random_edit(model, dense=dense)
    for name in edit.changes:
        edit.changes[name] = ke.Edit({name: edit.delta(name) * 1e-30}).changes[name]
    with pytest.raises(ValueError, match="rounding to torch.bfloat16 takes away all"):
        edit.apply(model)
    assert_unchanged(before, model.hf)
    ke.Edit({name: torch.zeros_like(edit.delta(name)) for name in edit.changes}).apply(model)  # a null edit is no loss


def test_an_edit_that_changes_nothing_is_told_of() -> None:
    model = fresh("gpt2")
    edit = random_edit(model, (1,))
    nothing = replace(edit.changes[weight_name(model, 1)], outputs=torch.zeros(WIDTH, 2))
    with pytest.warns(UserWarning, match="changes nothing"):
        ke.Edit({weight_name(model, 1): nothing}, "rome").bind(model)


def test_factors_beyond_float32_are_no_adapter(tmp_path) -> None:
    change = LowRank(
        torch.full((3, 1), 1e39, dtype=torch.float64), torch.full((4, 1), 1e-39, dtype=torch.float64), False
    )
    with pytest.raises(ValueError, match="numbers beyond float32"):
        ke.Edit({"a.weight": change}).to_peft(tmp_path)
    assert not list(tmp_path.iterdir())


# -- files -----------------------------------------------------------------------------------------------------------


def write(path, tensors: dict[str, torch.Tensor], **described) -> None:
    described = {"method": "x", "changes": {"a.weight": {"input_first": True}}} | described
    save_file(tensors, path, {"format": "knowedit_ext.edit.1", "edit": json.dumps(described)})


def factors(inputs=(3, 2), outputs=(4, 2), kind=torch.float64) -> dict[str, torch.Tensor]:
    return {"a.weight.inputs": torch.ones(inputs).to(kind), "a.weight.outputs": torch.ones(outputs).to(kind)}


@pytest.mark.parametrize(
    "tensors",
    [
        factors(inputs=(3, 1)),
        factors(inputs=(3,)),
        factors(outputs=(4, 2, 1)),
        factors(inputs=(3, 0), outputs=(4, 0)),
        factors(kind=torch.bool),
        factors(kind=torch.int32),
        factors() | {"a.weight.inputs": torch.full((3, 2), float("nan"))},
        factors() | {"a.weight.outputs": torch.full((4, 2), float("inf"))},
    ],
)
def test_files_with_changes_that_are_not_sound(tensors, tmp_path) -> None:
    write(tmp_path / "edit.safetensors", tensors)
    with pytest.raises(ValueError, match="edit.safetensors'"):
        ke.Edit.load(tmp_path / "edit.safetensors")


@pytest.mark.parametrize(
    "described",
    [
        {"method": 3},
        {"method": None},
        {"requests": {}},
        {"requests": "x"},
        {"params": []},
        {"contexts": "x"},
        {"compat": 1},
        {"model": "gpt2"},
        {"base": []},
        {"base": {"a.weight": 5}},
        {"base": {"a.weight": ["float32"]}},
        {"base": {"a.weight": ["float32", [3], "x"]}},
        {"seed": "1"},
        {"parts": "x"},
        {"other": 1},
        {"changes": []},
        {"changes": {"a.weight": {"input_first": 1}}},
        {"changes": {"a.weight": {"other": True}}},
        {"changes": {"a.weight": 3}},
        {"changes": {"b.weight": {}}},
    ],
    ids=str,
)
def test_files_that_describe_something_else(described, tmp_path) -> None:
    write(tmp_path / "edit.safetensors", factors())
    ke.Edit.load(tmp_path / "edit.safetensors")
    write(tmp_path / "edit.safetensors", factors(), **described)
    with pytest.raises(ValueError, match="edit.safetensors'"):
        ke.Edit.load(tmp_path / "edit.safetensors")


@pytest.mark.parametrize("wrong", ["text", 3, None, [], ["prompt"], {"prompt": []}, {"prompt": "{}", "subject": 3}])
def test_requests_that_are_none(wrong) -> None:
    with pytest.raises(TypeError, match="one of its requests is"):
        ke.Edit({}, requests=[{"prompt": "{}", "subject": "w3"}, wrong])


@pytest.mark.parametrize(
    "field, wrong",
    [("requests", {}), ("contexts", "{}"), ("params", []), ("model", None), ("base", []), ("method", 3), ("seed", "1")],
)
def test_fields_of_another_type(field: str, wrong) -> None:
    with pytest.raises(TypeError, match=f"its {field} is"):
        ke.Edit({}, **{field: wrong})
