"""Edits beside the weights: LoRA adapters, quantised weights, and the keys of earlier edits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import knowedit_ext as ke
from knowedit_ext.editing.edit import LowRank, weight_is_input_first
from knowedit_ext.world import load_world

from ..support.families import tiny_hf
from ..support.tokenizers import word_level

IDS = torch.arange(3, 12)[None]


def some_edit(model: ke.EditableModel, ranks: dict[int, int]) -> ke.Edit:
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for layer, rank in ranks.items():
        module = model.modules.down_projection(layer)
        first = weight_is_input_first(module)
        d_in, d_out = module.weight.shape if first else module.weight.shape[::-1]
        inputs, outputs = (0.1 * torch.randn(d, rank, generator=generator).double() for d in (d_in, d_out))
        changes[f"{model.modules.parameter_name(layer)}.weight"] = LowRank(inputs, outputs, first)
    return ke.Edit(changes, "test").bind(model)


@torch.no_grad()
def logits(hf: nn.Module) -> torch.Tensor:
    return hf(IDS).logits


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_gives_the_logits_of_the_edited_model(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = ke.load_model((tiny_hf(family), word_level()))
    edit = some_edit(model, {1: 3, 2: 5})
    with edit.applied(model):
        want = logits(model.hf)
    model.hf.save_pretrained(tmp_path / "base")
    edit.to_peft(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval())
    torch.testing.assert_close(adapted, want, rtol=1e-4, atol=1e-4)
    assert (logits(model.hf) - want).abs().max() > 1e-2


def test_a_dense_change_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not low-rank"):
        ke.Edit({"a.weight": torch.zeros(2, 2)}).to_peft(tmp_path)
    assert not list(tmp_path.iterdir())


class Int8Linear(nn.Module):
    """A stand-in for quantised layers: int8 weights with a scale a row, no floating parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", torch.round(linear.weight.detach() / self.scale).to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


def test_a_quantised_weight_gets_a_side_path() -> None:
    hf = tiny_hf("llama")
    for layer in hf.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
    model = ke.load_model((hf, word_level()))
    edit = some_edit(model, {1: 2})
    before = logits(hf)
    plain = tiny_hf("llama")  # the same model with its dequantised weights in full precision
    for layer, quantised in zip(plain.model.layers, hf.model.layers, strict=True):
        weight = quantised.mlp.down_proj
        layer.mlp.down_proj.weight.data = weight.weight.float() * weight.scale
    full = ke.load_model((plain, word_level()))
    with edit.applied(full), edit.applied(model):
        torch.testing.assert_close(logits(hf), logits(plain), rtol=1e-4, atol=1e-4)
        assert (logits(hf) - before).abs().max() > 1e-2
    assert torch.equal(logits(hf), before)
    dense = ke.Edit({name: edit.delta(name) for name in edit.changes})
    with pytest.raises(ValueError, match="quantised"):
        dense.apply(model)


def test_rounding_is_reported() -> None:
    model = ke.load_model((tiny_hf("gpt2").to(torch.bfloat16), word_level()))
    (lost,) = some_edit(model, {1: 2}).rounding(model).values()
    assert 0 < lost < 1
    (nothing,) = some_edit(model, {1: 2}).rounding(ke.load_model((tiny_hf("gpt2").double(), word_level()))).values()
    assert nothing < 1e-12


def test_a_later_edit_leaves_earlier_keys_alone() -> None:
    """With earlier=, what an earlier edit wrote at its keys changes less when the next one is made."""
    world = load_world()
    model = ke.load_model(world.folder, dtype="float32")
    width = model.modules.down_projection(2).weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(4 * width, width, generator=generator)
    moments = ke.Moments.from_arrays({2: (0.02 * sample.T @ sample / len(sample), len(sample))})
    params = ke.MEMITParams(layers=(2,), v_num_grad_steps=8, mom2_update_weight=1.0)
    contexts = [["{}"], ["So it is. {}"]]
    first = ke.memit(model, world.records()[:6], params, moments, contexts=contexts)
    first.apply(model)
    keys = next(iter(first.changes.values())).inputs  # spans the first edit's keys, seen through the moments
    later = world.records()[6:18]
    moved = []
    for earlier in ([], [first]):
        second = ke.memit(model, later, params, moments, contexts=contexts, earlier=earlier)
        (change,) = second.changes.values()
        c = moments[2].matrix().double()
        moved.append(float((change.outputs @ (change.inputs.T @ (c @ keys))).norm()))
    assert moved[1] < 0.8 * moved[0]
