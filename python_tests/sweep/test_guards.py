"""What a model's attention may ask of a sweep: anything else is refused, and so is attention that goes another way."""

from __future__ import annotations

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.sweep import attention
from knowedit_ext.sweep.attention import attending

from ..support.families import FAMILIES, VOCAB, tiny_hf
from ..support.tokenizers import word_level

FACT = ke.Fact(prompt="w5 w6 {} w9 w10 w11", subject="w3 w7")


def attend(**given) -> None:
    """What a sweep gives a layer's attention: 3 rows of one prompt, 2 heads."""
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    module = tiny_hf("llama").model.layers[0].self_attn
    with attending(module, torch.tensor([[0, 0, 0, 3, -1]], dtype=torch.int32)):
        attention._attend(module, q, k, v, given.pop("attention_mask", None), **given)


@pytest.mark.parametrize(
    "given",
    [
        dict(position_bias=torch.zeros(1, 2, 3, 3)),
        dict(attention_mask=torch.zeros(1, 1, 3, 3)),
        dict(attention_chunk_size=2),
        dict(temperature=0.5),
        dict(dropout=0.1),
        dict(is_causal=False),
        dict(use_cache=True),
        dict(unheard_of="x"),
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_is_not_computed_is_refused(given: dict) -> None:
    with pytest.raises(ke.UnsupportedModelError, match=f"LlamaAttention attends with {next(iter(given))}="):
        attend(**given)


def test_what_changes_nothing_passes() -> None:
    attend(
        dropout=0.0, is_causal=True, position_ids=torch.arange(3)[None], use_cache=False, s_aux=None, unheard_of=None
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("calls", [0, 2])
def test_attention_that_goes_another_way(family: str, calls: int) -> None:
    """Past the interface, or through it twice; the class is named."""
    model = ke.load_model((tiny_hf(family), word_level(VOCAB)))
    last = model.modules.attn(model.num_layers - 1)
    usual = last.forward

    def forward(hidden_states, *args, **kwargs):
        out = (hidden_states, None)
        for _ in range(calls):
            out = usual(hidden_states, *args, **kwargs)
        return out

    last.forward = forward
    says = "AttentionInterface" if calls == 0 else "more than once"
    with pytest.raises(ke.UnsupportedModelError, match=f"{type(last).__name__} .*{says}"):
        ke.trace(model, FACT, samples=2, noise=0.5)


def test_attention_without_a_config_is_refused() -> None:
    """There is no place to name a function in; what was changed so far is put back."""
    model = ke.load_model((tiny_hf("gpt2"), word_level(VOCAB)))
    before = model.hf.config._attn_implementation
    del model.modules.attn(2).config
    with pytest.raises(ke.UnsupportedModelError, match="GPT2Attention does not attend by"):
        with attention.tree_attention_in(model.modules):
            pass
    assert model.hf.config._attn_implementation == before


@pytest.mark.parametrize("scaled", [True, False])
def test_a_class_with_an_attn_of_its_own(scaled: bool) -> None:
    """As GPT-J before transformers 5.24; where its scale is not known it is refused."""

    class Own(torch.nn.Module):
        def forward(self, hidden_states):
            return self._attn(*(hidden_states[:, None] for _ in range(3)))[0][:, 0]

    module, modules = Own(), ke.load_model((tiny_hf("gpt2"), word_level(VOCAB))).modules
    modules.layers, modules.attn = modules.layers[:1], lambda layer: module
    rows, table = torch.randn(1, 3, 8), torch.tensor([[0, 0, 0, 3, -1]], dtype=torch.int32)
    if not scaled:
        with pytest.raises(ke.UnsupportedModelError, match="Own does not attend by"):
            with attention.tree_attention_in(modules):
                pass
        return
    module.scale_attn = 2.0
    with attention.tree_attention_in(modules), attending(module, table):
        got = module(rows)
    scores = (rows[0] @ rows[0].T / 2.0).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(got[0], scores.softmax(-1) @ rows[0])
    assert not hasattr(module, "_attn")
