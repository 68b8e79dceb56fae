"""MEMIT's ground, that a layer adds what its down projection puts out, is measured."""

from __future__ import annotations

import re

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.methods.memit import MEMITParams, memit_values
from knowedit_ext.editing.residual import check_adds_to_residual

from ..support.families import FAMILIES, LAYERS, VOCAB, tiny_hf
from ..support.strangers import stranger
from ..support.tokenizers import word_level
from ..support.unchanged import assert_unchanged, snapshot

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_families(family: str, dtype: torch.dtype) -> None:
    hf = tiny_hf(family).to(dtype)
    model, before = ke.load_model((hf, word_level(VOCAB))), snapshot(hf)
    if hasattr(model.modules.layers[0], "post_feedforward_layernorm"):
        for layer in range(LAYERS):
            with pytest.raises(ValueError, match=f"not defined for '{family}': its layer {layer} normalises"):
                check_adds_to_residual(model, [layer])
    else:
        check_adds_to_residual(model, range(LAYERS))
    assert_unchanged(before, hf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.22, 0.8, 1.0, 1.25])
def test_a_factor_is_named(factor: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stranger("granite", monkeypatch, residual_multiplier=factor)
    model.hf.to(dtype)
    if factor == 1.0:
        return check_adds_to_residual(model, range(LAYERS))
    params = MEMITParams(layers=(1, 2))
    with pytest.raises(ValueError, match="MEMIT .*'granite': its layer 1 multiplies .* by .*ROME works") as raised:
        memit_values(model, [ke.EditRequest("{} w5", "w7", " w9")], params, contexts=[["{}"]])
    assert float(re.search(r" by (\S+) ", str(raised.value)).group(1)) == pytest.approx(factor, rel=1e-2)


def test_one_layer_among_others() -> None:
    model = ke.load_model((tiny_hf("llama"), word_level(VOCAB)))
    model.modules.mlp(2).register_forward_hook(lambda module, args, output: output * 0.5)
    check_adds_to_residual(model, [0, 1, 3])
    with pytest.raises(ValueError, match="layer 2 multiplies the MLP's output by 0.5 "):
        check_adds_to_residual(model, [1, 2, 3])
