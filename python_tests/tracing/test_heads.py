"""Attention of single heads: against eager attention of transformers, and values by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.model.facts import tokenize_fact
from knowedit_ext.tracing.heads import head_attention

from ..support.families import FAMILIES, HEADS, LAYERS, tiny_model

FACTS = [ke.Fact("w5 {} w9 w10", "w7 w8"), ke.Fact("{} w9", "w11"), ke.Fact("w3 w4 w6 {}", "w12 w13")]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_that_of_eager(family: str) -> None:
    model = tiny_model(family)
    found = head_attention(model, FACTS)
    assert found.shape == (3, 2, LAYERS, HEADS)
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    try:
        for fact, measured in zip(FACTS, found, strict=True):
            tokenized = tokenize_fact(model, fact)
            with torch.no_grad():
                layers = model.hf(torch.tensor([tokenized.ids]), output_attentions=True).attentions
            want = torch.stack([x[0, :, -1, tokenized.subject_range[1] - 1] for x in layers])
            assert measured[0] == pytest.approx(want.numpy(), abs=2e-5)
    finally:
        model.hf.set_attn_implementation(before)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_values_by_hand(family: str) -> None:
    """|a v W_O| from the projections' own outputs and weights."""
    model = tiny_model(family)
    found = head_attention(model, FACTS)
    for fact, (weights, norms) in zip(FACTS, found, strict=True):
        tokenized = tokenize_fact(model, fact)
        at = tokenized.subject_range[1] - 1
        for layer in range(LAYERS):
            attention = model.modules.attn(layer)
            values, out = _values(family, model, attention, tokenized.ids)
            for head in range(HEADS):
                v = values[at, head]  # [d]
                rows = out[:, head * len(v) : (head + 1) * len(v)]  # [hidden, d]
                assert norms[layer, head] == pytest.approx(float(weights[layer, head] * (rows @ v).norm()), rel=1e-3)


def _values(family: str, model: ke.EditableModel, attention, ids) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [tokens, heads, d], output matrix [hidden, heads * d])"""
    names = {"gpt2": ("c_attn", "c_proj"), "llama": ("v_proj", "o_proj"), "gpt_neox": ("query_key_value", "dense")}
    source, out = (getattr(attention, name) for name in names[family])
    kept: list[torch.Tensor] = []
    handle = source.register_forward_hook(lambda _m, _a, output: kept.append(output.detach()[0]))
    with torch.no_grad():
        model.hf(torch.tensor([list(ids)]))
    handle.remove()
    if family == "gpt2":
        return kept[0].chunk(3, -1)[2].reshape(len(ids), HEADS, -1), out.weight.detach().T
    if family == "llama":
        shared = kept[0].reshape(len(ids), 2, -1)
        return shared.repeat_interleave(HEADS // 2, 1), out.weight.detach()
    return kept[0].reshape(len(ids), HEADS, 3, -1)[:, :, 2], out.weight.detach()


def test_many_prompts_are_as_one() -> None:
    model = tiny_model("qwen2")
    together = head_attention(model, FACTS)
    alone = np.stack([head_attention(model, [fact])[0] for fact in FACTS])
    assert together == pytest.approx(alone, abs=1e-5)
