"""Which base an edit belongs to: noted when it is made, kept in files, checked before anything changes."""

from __future__ import annotations

import copy
import json
import logging
import signal
from collections.abc import Iterator

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import knowedit_ext as ke
from knowedit_ext.editing import placing
from knowedit_ext.editing.methods.memit import MEMITParams, memit
from knowedit_ext.editing.methods.rome import ROMEParams, rome
from knowedit_ext.runs.interrupts import uninterrupted

from ..support.families import tiny_hf
from ..support.tokenizers import word_level
from ..support.unchanged import assert_unchanged, snapshot
from .models import fresh
from .plain import moments_of, weight_name
from .test_beside import Int8Linear
from .test_edit import REQUEST, bits, random_edit, same

LAYERS = (0, 2)
SETTINGS = dict(layers=LAYERS, v_num_grad_steps=2)


def in_dtype(dtype: torch.dtype, family: str = "gpt2") -> ke.EditableModel:
    return ke.load_model((tiny_hf(family).to(dtype), word_level()))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method, params, contexts", [(rome, ROMEParams, ["{}"]), (memit, MEMITParams, [["{}"]])])
def test_the_methods_note_it(method, params, contexts, family: str, tmp_path) -> None:
    model = fresh(family)
    edit = method(model, REQUEST, params(**SETTINGS), moments_of(model, LAYERS), contexts=contexts)
    assert list(edit.base) == [weight_name(model, layer) for layer in LAYERS] and edit.seed is None
    edit.save(tmp_path / "edit.safetensors")
    loaded = ke.Edit.load(tmp_path / "edit.safetensors")
    assert loaded.base == edit.base
    [line] = [line for line in loaded.summary().splitlines() if "base: " in line]
    assert len(line.split()[-1]) == 16
    loaded.apply(fresh(family))  # the same weights in another object
    other = fresh(family, seed=1)
    before = snapshot(other.hf)
    name = weight_name(model, 0)
    with pytest.raises(ValueError, match=f"made for another base .*'{name}' has other values; .*Empty its `base`"):
        loaded.apply(other)
    assert_unchanged(before, other.hf)
    loaded.base, loaded.model = {}, {}
    loaded.apply(other)


def test_the_seed_of_generated_contexts_is_kept() -> None:
    model = fresh("gpt2")
    edit = memit(model, REQUEST, MEMITParams(**SETTINGS), moments_of(model, LAYERS), seed=7)
    assert edit.seed == 7 and len(edit.contexts[1]) == 5


def test_one_changed_entry_is_another_base() -> None:
    edit, model = random_edit(fresh("gpt2")).bind(fresh("gpt2")), fresh("gpt2")
    name = weight_name(model, 2)
    with torch.no_grad():
        weight = model.hf.get_parameter(name)
        weight[5, 7] = torch.nextafter(weight[5, 7], torch.tensor(9.0))
    with pytest.raises(ValueError, match=f"'{name}' has other values. Empty"):
        edit.apply(model)
    with torch.no_grad():  # a weight that the edit does not change
        model = fresh("gpt2")
        model.hf.get_parameter(weight_name(model, 1)).add_(1.0)
    edit.apply(model)


def test_another_depth_is_another_base() -> None:
    edit = random_edit(fresh("gpt2"), layers=(0,)).bind(fresh("gpt2"))
    with pytest.raises(ValueError, match="another base .*layers is 3, was 4"):
        edit.apply(fresh("gpt2", n_layer=3))


def test_edits_on_top_of_edits_belong_to_the_base() -> None:
    model = fresh("gpt2")
    first = random_edit(model, seed=1).bind(model)
    first.apply(model)
    second = memit(model, REQUEST, MEMITParams(**SETTINGS), moments_of(fresh("gpt2"), LAYERS), contexts=[["{}"]])
    assert second.base == first.base
    second.apply(model)
    first.revert(model)  # out of order: the second alone is left
    alone = fresh("gpt2")
    second.apply(alone)
    assert same(bits(model), bits(alone))
    second.revert(model)
    assert same(bits(model), bits(fresh("gpt2")))


def test_moments_of_the_base_serve_a_model_that_carries_edits() -> None:
    """Collected over the base; an edit below is known. Of another model's moments the weight that differs is named."""
    model, contexts = fresh("gpt2"), [["{}"]]
    moments = ke.collect_moments(model, [f"w{n} w{n + 7} w{n + 3}" for n in range(3, 40)], LAYERS, progress=False)
    make = lambda on: memit(on, REQUEST, MEMITParams(**SETTINGS), moments, contexts=contexts, ridge="smallest")  # noqa: E731
    alone = make(model)
    with random_edit(model, layers=(0,)).applied(model):
        later = make(model)
    assert later.base == alone.base
    with torch.no_grad():
        model.hf.get_parameter(weight_name(model, 0))[1, 1] += 1.0
    before = snapshot(model.hf)
    with pytest.raises(ValueError, match=f"layer 2 were collected over another model.*'{weight_name(model, 0)}' has"):
        make(model)
    assert_unchanged(before, model.hf)


def test_weights_that_were_saved_with_an_edit_are_another_base() -> None:
    model = fresh("gpt2")
    first, second = (random_edit(model, seed=n).bind(model) for n in (1, 2))
    first.apply(model)
    baked = ke.load_model((copy.deepcopy(model.hf), model.tokenizer))  # knows of no edit
    with pytest.raises(ValueError, match="another base"):
        second.apply(baked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_copy_in_another_dtype_is_told_of(dtype: torch.dtype, caplog) -> None:
    edit, copy = random_edit(in_dtype(torch.float32)).bind(in_dtype(torch.float32)), in_dtype(dtype)
    with caplog.at_level(logging.WARNING):
        edit.apply(copy)
    kind = str(dtype).removeprefix("torch.")
    assert [record.getMessage() for record in caplog.records] == [
        f"the edit was made on float32 weights, '{copy.name}' has {kind}"
    ]
    other = ke.load_model((tiny_hf("gpt2", seed=1).to(dtype), word_level()))
    with pytest.raises(ValueError, match=rf"has other values \(and is {kind}, was float32\)"):
        edit.apply(other)


def test_a_quantised_copy_cannot_be_compared(caplog) -> None:
    edit, hf = random_edit(in_dtype(torch.float32, "llama")).bind(in_dtype(torch.float32, "llama")), tiny_hf("llama")
    for layer in hf.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
    model = ke.load_model((hf, word_level()))
    with caplog.at_level(logging.WARNING):
        edit.apply(model)
    assert "cannot be told: model.layers.0.mlp.down_proj.weight, " in caplog.text
    edit.revert(model)
    edit.bind(model).apply(model)  # of the quantised model itself
    edit.revert(model)
    hf.model.layers[0].mlp.down_proj.weight[0, 0] ^= 1
    with pytest.raises(ValueError, match="'model.layers.0.mlp.down_proj.weight' has other values"):
        edit.apply(model)


def test_files_without_a_base_are_read(tmp_path) -> None:
    file, model = tmp_path / "edit.safetensors", fresh("gpt2")
    random_edit(model).bind(model).save(file)
    with safe_open(file, framework="pt") as stored:
        described = json.loads(stored.metadata()["edit"])
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    del described["base"], described["seed"]
    save_file(tensors, file, {"format": "knowedit_ext.edit.1", "edit": json.dumps(described)})
    old = ke.Edit.load(file)
    assert old.base == {} and "base: not recorded" in old.summary()
    old.apply(fresh("gpt2", seed=1))  # as before: only shapes are known


def test_bases_are_joined() -> None:
    model, other = fresh("gpt2"), fresh("gpt2", seed=1)
    parts = [random_edit(model, layers, seed=n).bind(model) for n, layers in enumerate([(0, 1), (1, 2)])]
    joint = ke.Edit.merge(parts)
    assert joint.base == parts[0].base | parts[1].base and len(joint.base) == 3
    joint.apply(model)
    with pytest.raises(ValueError, match=f"different bases: '{weight_name(model, 1)}' has other values"):
        ke.Edit.merge([parts[0], random_edit(other, (1, 2)).bind(other)])


# -- interrupts ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """As on a terminal: a shell that starts the tests in the background has them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_ctrl_c_while_reverting(at: int, monkeypatch) -> None:
    """Two edits of three weights; the interrupt comes at one of the copies back, and waits."""
    model, put_back, calls = fresh("gpt2"), placing._put_back, []

    def interrupted(parameter: torch.nn.Parameter, before: torch.Tensor) -> None:
        calls.append(parameter)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        put_back(parameter, before)

    monkeypatch.setattr(placing, "_put_back", interrupted)
    first, second = random_edit(model, (0, 1, 2), seed=1), random_edit(model, (0, 1, 2), seed=2)
    first.apply(model), second.apply(model)
    with pytest.raises(KeyboardInterrupt):
        first.revert(model)
    alone = fresh("gpt2")
    second.apply(alone)
    assert same(bits(model), bits(alone)) and len(calls) == 6
    second.revert(model)
    assert same(bits(model), bits(fresh("gpt2")))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_ctrl_c_while_applying(at: int, behind: bool, monkeypatch) -> None:
    model = fresh("gpt2")
    before, edit, write, calls = snapshot(model.hf), random_edit(model, (0, 1, 2)), placing._write, []

    def interrupted(name: str, *args) -> bool:
        calls.append(name)
        if len(calls) == at + 1 and not behind:
            signal.raise_signal(signal.SIGINT)
        done = write(name, *args)
        if len(calls) == at + 1:
            signal.raise_signal(signal.SIGINT)
        return done

    monkeypatch.setattr(placing, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt), edit.applied(model):
        raise AssertionError("not reached")
    assert_unchanged(before, model.hf)
    with pytest.raises(ValueError, match="not applied"):
        edit.revert(model)


def test_an_interrupt_is_kept_until_the_end() -> None:
    before, reached = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
    assert reached and signal.getsignal(signal.SIGINT) is before
    with uninterrupted():
        pass
