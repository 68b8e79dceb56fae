"""Editing wrapped and adapted models: as the plain or the merged model is edited, and that very model says so."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import knowedit_ext as ke
from knowedit_ext.editing.changes import LowRank
from knowedit_ext.editing.rows import EditedRows

from ..models.test_wrappers import compiled, lora, wrapper  # noqa: F401 (a fixture)
from ..support.families import tiny_hf
from ..support.tokenizers import word_level
from ..support.unchanged import assert_unchanged, snapshot
from .plain import moments_of
from .test_beside import Int8Linear
from .test_edit import REQUEST, random_edit

IDS = torch.tensor([[3, 4, 5, 6, 7]])
VALUES = dict(v_num_grad_steps=4, v_lr=0.1, v_weight_decay=0.0, kl_factor=0.0)
ROME = ke.ROMEParams(layers=(1,), **VALUES)
MEMIT = ke.MEMITParams(layers=(0, 1), mom2_update_weight=10.0, **VALUES)
FT = ke.FTParams(layers=(1,), num_steps=3, lr=1e-2)


@torch.no_grad()
def logits(hf: nn.Module) -> torch.Tensor:
    return hf(IDS, use_cache=False).logits


def made(model: ke.EditableModel, method: str) -> ke.Edit:
    if method == "ft":
        return ke.finetune(model, REQUEST, FT)
    moments = moments_of(model, (0, 1))
    if method == "rome":
        return ke.rome(model, REQUEST, ROME, moments=moments, contexts=["{}", "w11. {}"])
    return ke.memit(model, REQUEST, MEMIT, moments=moments, contexts=[["{}"], ["w11. {}"]])


def assert_same_edit(got: ke.Edit, want: ke.Edit) -> None:
    assert list(got.changes) == list(want.changes)
    for name in want.changes:
        assert want.delta(name).norm() > 1e-3
        assert (got.delta(name) - want.delta(name)).norm() <= 1e-3 * want.delta(name).norm()


@pytest.mark.parametrize("method", ["rome", "memit", "ft"])
def test_a_wrapped_model_is_edited_as_the_plain_one(method: str, wrapper) -> None:  # noqa: F811
    handed = wrapper(tiny_hf("llama"))
    plain, model = (ke.load_model((hf, word_level())) for hf in (tiny_hf("llama"), handed))
    outer = handed.module if isinstance(handed, nn.DataParallel) else handed  # which calls it, without a GPU
    before = logits(outer)
    edit, want = made(model, method), made(plain, method)
    assert_same_edit(edit, want)
    assert edit.base == want.base
    with edit.applied(model), want.applied(plain):
        changed = logits(outer)
        torch.testing.assert_close(changed, logits(plain.hf), rtol=1e-4, atol=1e-4)
    assert (changed - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(outer), before)
    with EditedRows(model, [edit]).rows(torch.tensor([0])) if method != "ft" else edit.applied(model):
        torch.testing.assert_close(logits(model.hf), changed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["rome", "memit", "ft"])
@pytest.mark.parametrize("where", ["attention", "down", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_lora_model_is_edited_in_its_base_weights(family: str, where: str, method: str, tmp_path) -> None:
    """As the model with the adapter merged, which says the same, under the names of the model without one."""
    adapted = lora(family, where)
    model = ke.load_model((adapted, word_level()))
    merged = ke.load_model((copy.deepcopy(adapted).merge_and_unload(), word_level()))
    before = snapshot(model.hf)
    edit, want = made(model, method), made(merged, method)
    assert_unchanged(before, model.hf)
    assert_same_edit(edit, want)
    edit.save(tmp_path / "edit.safetensors")
    edit = ke.Edit.load(tmp_path / "edit.safetensors")
    unedited = logits(adapted)
    with edit.applied(model), want.applied(merged):
        changed, wanted = logits(adapted), logits(merged.hf)
    assert (changed - wanted).abs().max() < 0.05 * (changed - unedited).abs().max()
    assert torch.equal(logits(adapted), unedited) and (changed - unedited).abs().max() > 1e-3
    if method != "ft":
        with EditedRows(model, [edit]).rows(torch.tensor([0])):
            torch.testing.assert_close(logits(model.hf), changed, rtol=1e-4, atol=1e-4)
    plain = ke.load_model((tiny_hf(family), word_level()))
    edit.apply(plain)  # the base is that of the model without the adapter


@pytest.mark.parametrize("template", [None, "model.layers.{}", "model.layers.{}.mlp", "model.layers.{}.self_attn"])
@pytest.mark.parametrize("compat", [None, "reference"])
def test_no_adapter_is_trained(template: str | None, compat: str | None) -> None:
    adapted = lora("llama", "all")
    before = snapshot(adapted)
    model, plain = (ke.load_model((hf, word_level())) for hf in (adapted.base_model.model, tiny_hf("llama")))
    params = replace(FT, rewrite_module_tmp=template)
    names = [list(ke.finetune(m, REQUEST, params, compat=compat).changes) for m in (model, plain)]
    assert names[0] == names[1] and names[0]
    assert_unchanged(before, adapted)


def test_evaluation_of_a_lora_model_under_an_edit() -> None:
    from knowedit_ext.evaluation.edited import Edited

    adapted = lora("gpt2", "down")
    model = ke.load_model((adapted, word_level()))
    for dense in (False, True):
        edit = random_edit(model, dense=dense)
        edited = Edited(model, edit)
        assert edited.first_layer == 0
        with edit.applied(model):
            want = logits(adapted)
        with edited.rows(torch.tensor([0])):
            torch.testing.assert_close(logits(adapted), want)
        assert (logits(adapted) - want).abs().max() > 1e-2


# -- a weight that is written to, and not computed with ----------------------------------------------------------------


class Frozen(nn.Linear):
    """Computes with a copy of its weight that it made once, as fused and packed layers do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.packed = [linear.weight.detach().clone()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.packed[0].T


class Scaled(nn.Linear):
    """Its weight is not all there is to its product, as with weights in 8 bits and a scale beside them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


class Deaf(Int8Linear):
    """Called past its hooks."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Frozen, Scaled, Deaf])
@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_a_change_that_the_model_does_not_see_is_refused(kind, dtype: torch.dtype, scale: float) -> None:
    hf = tiny_hf("llama").to(dtype)
    edit = random_edit(ke.load_model((tiny_hf("llama"), word_level())), layers=(0, 2))
    for name, change in edit.changes.items():
        edit.changes[name] = LowRank(change.inputs * scale, change.outputs, change.input_first)
    hf.model.layers[2].mlp.down_proj = kind(hf.model.layers[2].mlp.down_proj)
    model = ke.load_model((hf, word_level()))
    before, unedited = snapshot(hf), logits(hf)
    with pytest.raises(ValueError, match=f"does not compute with 'model.layers.2.*{kind.__name__}"):
        edit.apply(model)
    assert_unchanged(before, hf)
    assert torch.equal(logits(hf), unedited) and not model.applied_edits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "gpt_neox", "phi3", "gemma3_text"])
@pytest.mark.parametrize("scale", [1e3, 1.0, 1e-3])
def test_what_the_model_sees_is_not_refused(family: str, scale: float, dtype: torch.dtype) -> None:
    """Large and small changes of linear maps with and without a bias, of tied embeddings and of norms, in any type."""
    hf = tiny_hf(family).to(dtype)
    model = ke.load_model((hf, word_level()))
    before, generator = snapshot(hf), torch.Generator().manual_seed(0)
    for name, parameter in hf.named_parameters():
        if dtype == torch.float16 and scale > 1:
            continue
        size = scale * float(parameter.detach().float().abs().mean() + 1e-3)
        change = size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if torch.equal((parameter.detach().double() + change).to(dtype), parameter):
            continue
        with ke.Edit({name: change}).applied(model):
            pass
    assert_unchanged(before, hf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_a_side_path_is_seen_or_too_small_to_tell(scale: float, dtype: torch.dtype) -> None:
    hf = tiny_hf("llama")
    for layer in hf.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
    model = ke.load_model((hf.to(dtype), word_level()))
    edit = random_edit(ke.load_model((tiny_hf("llama"), word_level())))
    for name, change in edit.changes.items():
        edit.changes[name] = LowRank(change.inputs * scale, change.outputs, change.input_first)
    before = logits(hf)
    with edit.applied(model):
        pass
    assert torch.equal(logits(hf), before)


def test_an_adapter_under_training_does_not_hide_a_change() -> None:
    """Dropout makes two answers differ; the weight is looked at without."""
    adapted = lora("llama", "down")
    model = ke.load_model((adapted, word_level()))
    adapted.train()
    for module in adapted.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    before, edit = snapshot(adapted), random_edit(model)
    with edit.applied(model):
        pass
    assert_unchanged(before, adapted)


@pytest.mark.parametrize("make", [compiled, lambda hf: hf.compile(backend="eager") or hf])
def test_compiled_code_sees_a_side_path(make) -> None:
    """Compiled before the edit; hooks that come later are not looked for, but by code that is compiled anew."""
    hf = tiny_hf("llama")
    for layer in hf.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
    handed = make(hf)
    model = ke.load_model((handed, word_level()))
    edit = random_edit(ke.load_model((tiny_hf("llama"), word_level())))
    before = logits(handed)
    with edit.applied(model):
        assert (logits(handed) - before).abs().max() > 1e-2
    assert torch.equal(logits(handed), before)
    torch.compiler.reset()
