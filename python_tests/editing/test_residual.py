"""What a layer adds of what its down projection puts out is measured; a change is pulled back through it."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import knowedit_ext as ke
from knowedit_ext.editing.residual import Adding, measure_adding, nearest

from ..support.families import FAMILIES, LAYERS, VOCAB, tiny_hf
from ..support.more_families import known, more_hf
from ..support.tokenizers import word_level
from ..support.unchanged import assert_unchanged, snapshot
from .plain import hooked

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POST_NORM = ("gemma2", "gemma3", "gemma3_text", "olmo2")
FACTORS = dict(hyperclovax=0.6, granite=0.6, minicpm3=1.4 / LAYERS**0.5)
MORE = known(dict.fromkeys(("olmo3", "glm4", "exaone4", "gemma4_text", "phi", "opt", *FACTORS), {}))


def loaded(hf) -> ke.EditableModel:
    return ke.load_model((hf, word_level(VOCAB)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_families(family: str, dtype: torch.dtype) -> None:
    hf = tiny_hf(family).to(dtype)
    before = snapshot(hf)
    found = measure_adding(loaded(hf), range(LAYERS)).values()
    assert_unchanged(before, hf)
    assert all(each.factor == 1.0 and (each.weight is None) == (family not in POST_NORM) for each in found)


@pytest.mark.parametrize("family", MORE)
def test_what_arrives_is_what_was_wanted(family: str) -> None:
    """At the layer's own output, in float64; wanted is what a norm can put out."""
    model = loaded(more_hf(family).double())
    adding = measure_adding(model, [1])[1]
    assert adding.factor == pytest.approx(FACTORS.get(family, 1.0), rel=1e-3)
    down, norm = model.modules.down_projection(1), model.modules.mlp_norm(1)
    assert (adding.weight is None) == (norm is None)
    change, read, seen = torch.zeros(model.hidden_size, dtype=torch.float64), [], []

    def put_out(args: tuple, out: torch.Tensor) -> None:
        read.append(out.view(-1, out.shape[-1])[-1:].clone())
        out.view(-1, out.shape[-1])[-1] += change

    def run() -> torch.Tensor:
        model.hf(torch.tensor([[5, 6, 7]]), use_cache=False)
        return seen[-1]

    with (
        torch.no_grad(),
        hooked(down, put_out),
        hooked(model.modules.layers[1], lambda a, out: seen.append(out[0, -1])),
    ):
        before = run().clone()
        m = read[0]
        other = m + 0.3 * torch.randn(m.shape, dtype=torch.float64)
        wanted = adding.factor * (norm(other) - norm(m) if isinstance(norm, nn.Module) else other)
        change += adding.change(m, wanted)[0]
        after = run()
    assert (after - before - wanted[0]).norm() <= 1e-3 * wanted.norm()  # a norm's epsilon is left out


@pytest.mark.parametrize("seed", range(5))
def test_nothing_that_the_norm_puts_out_is_nearer(seed: int) -> None:
    torch.manual_seed(seed)
    weight, aim = torch.randn(6, dtype=torch.float64), 3 * torch.randn(1, 6, dtype=torch.float64)
    u = nearest(weight, aim)
    assert float(u.square().mean()) == pytest.approx(1.0, abs=1e-12)

    def off(x) -> float:
        x = torch.from_numpy(x)
        return float((weight * x / x.square().mean().sqrt() - aim[0]).norm())

    starts = torch.randn(8, 6, dtype=torch.float64).numpy()
    assert off(u[0].numpy()) <= min(minimize(off, start, tol=1e-14).fun for start in starts) + 1e-6


def test_out_of_reach_is_approached() -> None:
    torch.manual_seed(0)
    weight, m = 1 + torch.rand(8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    adds = lambda x: weight * x / x.square().mean(-1, keepdim=True).sqrt()  # noqa: E731
    wanted = 5 * torch.randn(3, 8, dtype=torch.float64)
    new = m + Adding(1.0, weight).change(m, wanted)
    assert ((adds(new) - adds(m) - wanted).norm(dim=-1) < wanted.norm(dim=-1)).all()
    assert Adding(1.0, weight).change(m, torch.zeros_like(m)).norm() <= 1e-9 * m.norm()


def test_one_layer_among_others() -> None:
    model = loaded(tiny_hf("llama"))
    model.modules.mlp(2).register_forward_hook(lambda module, args, output: output * 0.5)
    found = measure_adding(model, range(LAYERS))
    assert [found[n].factor for n in range(LAYERS)] == pytest.approx([1, 1, 0.5, 1], rel=1e-3)
    model.modules.mlp(1).register_forward_hook(lambda module, args, output: output.tanh())
    with pytest.raises(ValueError, match=r"MEMIT is not defined for 'llama': its layer 1 .*; ROME works"):
        measure_adding(model, [1])
