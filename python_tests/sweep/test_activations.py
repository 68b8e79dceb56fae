"""Activation functions that a sweep runs as one kernel: the same numbers, and the model as it was afterwards."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN, NewGELUActivation

from knowedit_ext.model.activations import fused_gelu
from knowedit_ext.sweep.attention import tree_attention_in

from ..editing.models import editable
from ..support.families import FAMILIES

X = torch.linspace(-12, 12, 1001)


def parts(model) -> list[torch.nn.Module]:
    return [m for m in model.hf.modules() if isinstance(m, NewGELUActivation)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_function(family: str) -> None:
    model = editable(family)
    mlp = model.modules.mlp(1)
    x = torch.randn(5, model.hidden_size, generator=torch.Generator().manual_seed(0))
    own = x.clone().requires_grad_()
    before = mlp(own[None])
    before.sum().backward()
    fused = x.clone().requires_grad_()
    with tree_attention_in(model.modules):
        after = mlp(fused[None])
        after.sum().backward()
        assert bool(parts(model)) == (family in ("gpt2", "gptj"))
        assert all("forward" in vars(part) for part in parts(model))
    assert not any("forward" in vars(part) for part in parts(model))
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fused.grad, own.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_precision(dtype: torch.dtype) -> None:
    model = editable("gpt2")
    x, plain = X.to(dtype), ACT2FN["gelu_new"](X.to(dtype))
    with fused_gelu(*model.modules.layers), fused_gelu(*model.modules.layers):
        got = parts(model)[0](x)
    if dtype.itemsize == 2:  # each of the many kernels rounds: that is what the model computes
        assert torch.equal(got, plain)
    else:
        torch.testing.assert_close(got, plain, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)
