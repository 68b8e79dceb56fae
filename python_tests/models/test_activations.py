"""GELU in one pass: the same numbers, and the modules as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.activations import ACT2FN

from knowedit_ext.model.activations import fused_gelu

NAMES = ("gelu_new", "gelu_fast", "gelu", "relu")


def modules() -> torch.nn.Module:
    return torch.nn.ModuleList(copy.deepcopy(ACT2FN[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_numbers_and_gradients(dtype: torch.dtype) -> None:
    x = torch.linspace(-30, 30, 4001).to(dtype)
    for module in modules():
        got, want = x.clone().requires_grad_(), x.clone().requires_grad_()
        with fused_gelu(module):
            module(got).sum().backward()
        module(want).sum().backward()
        with fused_gelu(module):
            inside = module(x)
        close = {torch.float32: 2e-6, torch.float64: 1e-7, torch.bfloat16: 0.0}[
            dtype
        ]  # "gelu_fast" has a rounded constant
        assert float((inside - module(x)).abs().max()) <= close * (1 + float(x.abs().max()))
        assert float((got.grad - want.grad).abs().max()) <= max(close, 1e-5 * (close > 0))


def test_modules_are_left_as_they_were_whatever_happens_inside() -> None:
    model = modules()
    own = lambda x: x  # noqa: E731
    model[1].forward = own  # somebody else's
    before = [dict(vars(module)) for module in model]
    with pytest.raises(RuntimeError, match="inside"), fused_gelu(model):
        assert "forward" in vars(model[0]) and model[1].forward is own and "forward" not in vars(model[2])
        with fused_gelu(model):  # within another
            pass
        assert "forward" in vars(model[0])
        raise RuntimeError("inside")
    assert [dict(vars(module)) for module in model] == before
