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
from knowedit_ext.model.identity import identity

from ..support.families import FAMILIES, tiny_hf
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
