"""Torch's defaults and a model's configuration as people leave them: the same numbers, or an error for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.model.errors import NotFiniteError, UnsupportedModelError
from knowedit_ext.model.hooks import resting

from ..editing.models import fresh
from ..support.families import tiny_model

FACT = ke.Fact("w5 {} w9 w10", "w3 w7")
REQUEST = ke.EditRequest("w5 {} w9 w10", "w3 w7", "w20")
PARAMS = ke.ROMEParams(layers=(1,), v_num_grad_steps=5, mom2_adjustment=False)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def results(model: ke.EditableModel) -> tuple[ke.Trace, ke.Edit, ke.Edit]:
    trace = ke.trace(model, FACT, samples=2, noise=0.5, window=2)
    edit = ke.rome(model, REQUEST, PARAMS, contexts=["{}", "w11 w12. {}"])
    tuned = ke.finetune(model, [REQUEST], ke.FTParams(layers=(1,), num_steps=3))
    return trace, edit, tuned


def numbers(trace: ke.Trace, *edits: ke.Edit) -> list[torch.Tensor]:
    return [torch.as_tensor(trace.scores), *(edit.delta(name) for edit in edits for name in edit.changes)]


@pytest.mark.parametrize(
    "situation",
    [
        lambda: default_dtype(torch.float64),
        lambda: default_dtype(torch.bfloat16),
        lambda: default_device("meta"),
        lambda: torch.device("meta"),
        torch.no_grad,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_the_same_numbers(family: str, situation: Callable) -> None:
    want = results(tiny_model(family))
    model = tiny_model(family)
    with situation():
        before = torch.get_default_dtype(), torch.get_default_device()
        found = results(model)
        assert (torch.get_default_dtype(), torch.get_default_device()) == before
    assert all(torch.equal(a, b) for a, b in zip(numbers(*found), numbers(*want), strict=True))


def test_defaults_return_after_an_error() -> None:
    with default_dtype(torch.float64), default_device("meta"):
        with pytest.raises(KeyError), resting(tiny_model("gpt2")):
            assert torch.empty(1).dtype == torch.float32 and not torch.empty(1).is_meta
            raise KeyError
        assert torch.empty(1).dtype == torch.float64 and torch.empty(1).is_meta


def tuples(hf: torch.nn.Module) -> None:
    hf.config.return_dict = False


def two_dtypes(hf: torch.nn.Module) -> None:
    hf.model.layers[1].mlp.down_proj.to(torch.bfloat16)


def head_in_float32(hf: torch.nn.Module) -> None:
    hf.bfloat16()
    hf.lm_head.float()


@pytest.mark.parametrize("spoil", [tuples, two_dtypes, head_in_float32])
def test_what_cannot_run_by_itself_is_said(spoil: Callable[[torch.nn.Module], None]) -> None:
    model = fresh("llama")
    spoil(model.hf)
    for door in (
        lambda: ke.trace(model, FACT, samples=2, noise=0.5, window=2),
        lambda: ke.rome(model, REQUEST, PARAMS, contexts=["{}"]),
        lambda: ke.rome(model, REQUEST, PARAMS),
    ):
        with pytest.raises(UnsupportedModelError, match="own forward fails"):
            door()


@pytest.mark.parametrize("part", ["layer", "mlp", "self_attn"])
def test_layers_that_share_a_module_are_refused(part: str) -> None:
    model = fresh("llama")
    hf, tokenizer = model.hf, model.tokenizer
    layers = hf.model.layers
    if part == "layer":
        layers[2] = layers[1]
    else:
        setattr(layers[2], part, getattr(layers[1], part))
    with pytest.raises(UnsupportedModelError, match="layers 1 and 2 share one module"):
        ke.load_model((hf, tokenizer))


def test_numbers_that_are_not_finite_are_a_value_error() -> None:
    model = fresh("gpt2")
    model.hf.transformer.h[2].mlp.c_fc.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="no finite numbers") as caught:
        ke.trace(model, FACT, samples=2, noise=0.5, window=2)
    assert isinstance(caught.value, NotFiniteError) and isinstance(caught.value, FloatingPointError)


def test_threads_take_turns() -> None:
    model = fresh("llama")
    model.hf.train()
    want = torch.as_tensor(ke.trace(model, FACT, samples=2, noise=0.5, window=2).scores)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: results(model)[0].scores, range(8)))
    assert all(torch.equal(torch.as_tensor(scores), want) for scores in found)
    assert all(module.training for module in model.hf.modules())
    assert all(parameter.requires_grad for parameter in model.hf.parameters())
