"""What a model is told by: its weights as they are, wherever they are kept, its numbers and its tokenizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import knowedit_ext as ke
from knowedit_ext.editing.edit import LowRank
from knowedit_ext.model.identity import config, differing_config, identity

from ..support.families import FAMILIES, tiny_hf, under_config
from ..support.tokenizers import word_level


def model_of(hf: nn.Module, tokenizer=None, **options) -> ke.EditableModel:
    return ke.load_model((hf, tokenizer or word_level()), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_takes_part(family: str) -> None:
    model = model_of(tiny_hf(family))
    before = identity(model)
    assert identity(model_of(tiny_hf(family))) == before
    for name, parameter in model.hf.named_parameters():
        flat = parameter.data.view(-1)
        old = flat[-1].clone()
        flat[-1] += 1
        assert identity(model)["weights"] != before["weights"], name
        flat[-1] = old
    assert identity(model) == before


def test_numbers_and_tokenizer_take_part() -> None:
    plain = identity(model_of(tiny_hf("gpt2")))
    for other, key in [
        (model_of(tiny_hf("gpt2"), bos=False), "bos"),
        (model_of(tiny_hf("gpt2"), word_level(58)), "tokenizer"),
        (model_of(tiny_hf("gpt2"), precision="tf32"), "precision"),
    ]:
        assert {k for k, v in identity(other).items() if v != plain[k]} == {key}
    half = identity(model_of(tiny_hf("gpt2"), dtype="bfloat16"))
    assert {k for k, v in half.items() if v != plain[k]} == {"dtype", "weights"}


@pytest.mark.parametrize(
    "family, changed",
    [
        ("gpt2", {"n_head": 1}),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("llama", {"rms_norm_eps": 0.1}),
        ("llama", {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("mistral", {"sliding_window": 1}),
    ],
)
def test_the_same_weights_under_another_config_are_another_model(family: str, changed: dict) -> None:
    """Its numbers are others, too: checked by the model's own forward."""
    plain = tiny_hf(family)
    other = under_config(plain, **changed)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    assert not torch.allclose(plain(ids).logits, other(ids).logits, atol=1e-6)
    there, here = identity(model_of(plain)), identity(model_of(other))
    assert {key for key in there if there[key] != here[key]} == {"config"}
    assert differing_config(there["config"], here["config"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_of_what_was_saved_and_loaded_is_the_same(family: str, tmp_path: Path) -> None:
    plain = tiny_hf(family)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path, dtype=torch.float32)
    again.config.use_cache = False
    for hf in (again, again.bfloat16()):
        assert config(model_of(hf)) == config(model_of(plain))


def test_a_config_of_another_transformers_is_compared_by_what_both_say() -> None:
    said = config(model_of(tiny_hf("llama")))
    assert differing_config({k: v for k, v in said.items() if k != "head_dim"}, said | {"new": 1}) == []
    assert differing_config(said, said | {"rms_norm_eps": 1.0}) == [
        f"config.rms_norm_eps: {said['rms_norm_eps']} there, 1.0 asked"
    ]


def test_what_is_offloaded_is_read_where_it_is_kept(tmp_path: Path) -> None:
    want = identity(model_of(tiny_hf("gpt2")))
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        for offload in (cpu_offload, partial(disk_offload, offload_dir=folder)):
            model = model_of(tiny_hf("gpt2", seed))
            offload(model.hf, execution_device=torch.device("cpu"))
            assert any(p.is_meta for p in model.hf.parameters())
            assert (identity(model) == want) is (seed == 0)


def test_a_weight_that_is_nowhere_is_named() -> None:
    model = model_of(tiny_hf("gpt2"))
    layer = model.hf.transformer.h[1].mlp.c_fc
    layer.weight = nn.Parameter(layer.weight.to("meta"))
    with pytest.raises(ValueError, match=r"weight 'transformer.h.1.mlp.c_fc.weight' is not in memory"):
        identity(model)


def test_what_a_packed_weight_is_made_of_takes_part() -> None:
    def packed(second: float) -> ke.EditableModel:
        model = model_of(tiny_hf("llama"))
        layer = model.hf.model.layers[1].mlp.up_proj
        parts = layer.weight.detach(), torch.full_like(layer.weight, second)
        layer.weight = nn.Parameter(TwoTensor(*parts), requires_grad=False)
        return model

    assert identity(packed(1.0)) == identity(packed(1.0))
    assert identity(packed(1.0))["weights"] != identity(packed(2.0))["weights"]


def test_what_stands_beside_a_packed_weight_takes_part() -> None:
    class Packed(nn.Linear):
        """Keeps its weight as whole numbers."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(linear.in_features, linear.out_features, bias=False)
            del self._parameters["weight"]
            self.register_buffer("weight", (linear.weight.detach() * 1000).round().to(torch.int16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight.to(x.dtype) / 1000).T

    model = model_of(tiny_hf("llama"))
    layer = model.hf.model.layers[1].mlp
    layer.down_proj = Packed(layer.down_proj)
    name, wide = "model.layers.1.mlp.down_proj.weight", layer.down_proj.in_features
    plain = identity(model)
    identities = []
    for size in (1.0, 2.0):
        change = LowRank(torch.full((wide, 1), size), torch.ones(model.hidden_size, 1), False)
        with ke.Edit({name: change}).applied(model):
            identities.append(identity(model))
    assert identities[0]["weights"] == identities[1]["weights"] == plain["weights"]
    assert len({tuple(each["beside"]) for each in (plain, *identities)}) == 3 and identity(model) == plain
