"""Gradients through frozen prompts, in float64, against autograd through the model's own forward pass."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.sweep.capture import clean_runs
from knowedit_ext.sweep.frozen import FrozenPrompts
from knowedit_ext.sweep.packed import PackedPrompts

from ..support.families import FAMILIES, WIDTH, tiny_hf
from ..support.oracle import Plain
from ..support.tokenizers import word_level
from .plain import hooked

PROMPTS = [(5, 6, 7, 8, 9, 10, 11), (20, 21, 22), (30, 31, 32, 33, 34)]
TOKENS = [2, 0, 4]
READOUT = [(4, 6), (2,), (4,)]  # the last one is the changed token itself
LAYER = 1
IN_FLOAT64 = ("gpt2", "gpt_neox")  # the others have norms or attention scores in float32 whatever the weights are


def double(family: str) -> ke.EditableModel:
    return ke.load_model((tiny_hf(family).double(), word_level()))


# Beginnings in common: left of the tokens, beyond them, whole prompts, and the same prompt changed elsewhere.
SHARING = [
    ((5, 6, 7, 8, 9, 10, 11), 4, (4, 6)),
    ((5, 6, 7, 20), 1, (2, 3)),
    ((5, 6, 7, 8, 9, 30, 31), 2, (6,)),
    ((5, 6, 7, 8, 9, 30, 31), 5, (5, 6)),
    ((5, 6, 7, 8, 9, 30), 0, (5, 3)),
    ((5, 6, 7, 20, 21), 3, (4,)),
]


def frozen(model: ke.EditableModel, sites: tuple[str, ...], layer: int = LAYER) -> FrozenPrompts:
    return FrozenPrompts(PackedPrompts(model, clean_runs(model, PROMPTS)), sites, layer, TOKENS, READOUT)


ASKED = list(zip(PROMPTS, TOKENS, READOUT, strict=True))


def plain(model: ke.EditableModel, sites: tuple[str, ...], added: torch.Tensor, asked=ASKED, layer: int = LAYER):
    """The same states, prompt by prompt: [all readouts, hidden] entering the head."""
    states = []
    for (ids, token, positions), changes in zip(asked, added, strict=True):

        def add(args: tuple, output: torch.Tensor, token: int, change: torch.Tensor) -> torch.Tensor:
            row = torch.arange(output.shape[1])[:, None] == token
            return output + torch.where(row, change, 0.0)

        seen = []
        with ExitStack() as stack:
            for site, change in zip(sites, changes, strict=True):
                module = Plain(model.hf).module(site, layer)
                stack.enter_context(hooked(module, partial(add, token=token, change=change)))
            head = model.hf.get_output_embeddings()
            stack.enter_context(hooked(head, lambda args, output, seen=seen: seen.append(args[0])))
            model.hf(torch.tensor([ids]), use_cache=False)
        states.append(seen[0][0, list(positions)])
    return torch.cat(states)


@pytest.mark.parametrize("layer", [0, LAYER])
@pytest.mark.parametrize("sites", [("mlp",), ("attn",), ("layer",), ("mlp", "attn")], ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients(family: str, sites: tuple[str, ...], layer: int) -> None:
    model = double(family)
    generator = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    added = random(len(PROMPTS), len(sites), WIDTH).requires_grad_()
    weights = random(sum(map(len, READOUT)), WIDTH)
    tolerance = 1e-10 if family in IN_FLOAT64 else 1e-4
    got, want = frozen(model, sites, layer)(added), plain(model, sites, added, layer=layer)
    assert torch.allclose(got, want, rtol=0, atol=tolerance * float(want.detach().abs().max()))
    [mine], [theirs] = (torch.autograd.grad((x * weights).sum(), added) for x in (got, want))
    assert theirs.abs().min(dim=-1).values.min() > 0  # every prompt's readouts depend on its change
    assert torch.allclose(mine, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox"])
def test_gradcheck(family: str) -> None:
    run = frozen(double(family), ("mlp",))
    added = 0.3 * torch.randn(len(PROMPTS), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    along = torch.randn(1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    # Along one direction a prompt: enough to see every path, and cheap.
    assert torch.autograd.gradcheck(lambda size: run((size * along)[:, None])[:, ::8], added.requires_grad_())


@pytest.mark.parametrize(("family", "projections"), [("gpt2", ["c_attn"]), ("llama", ["q_proj", "k_proj", "v_proj"])])
@pytest.mark.parametrize("site", ["mlp", "layer"])
def test_what_does_not_change_is_not_computed_again(family: str, projections: list[str], site: str) -> None:
    """Rows that modules are given: the edited MLP one, to have an output; projections behind it those that changed."""
    model = double(family)
    run, given = frozen(model, (site,), 0), {}

    def see(name: str, args: tuple, output: torch.Tensor) -> None:
        given[name] = output.shape[1]

    with ExitStack() as stack:
        for name, module in model.hf.named_modules():
            if name.rsplit(".")[-1] in ("down_proj", "c_proj", "o_proj", *projections):
                stack.enter_context(hooked(module, partial(see, name)))
        run(torch.zeros(len(PROMPTS), 1, WIDTH, dtype=torch.float64))
    stem, attention, down, out = {
        "gpt2": ("transformer.h", "attn", "c_proj", "c_proj"),
        "llama": ("model.layers", "self_attn", "down_proj", "o_proj"),
    }[family]
    rows = sum(len(ids) - token for ids, token in zip(PROMPTS, TOKENS, strict=True))
    assert given.get(f"{stem}.0.mlp.{down}") == (1 if site == "mlp" else None)
    assert [given[f"{stem}.1.{attention}.{name}"] for name in projections] == [len(PROMPTS)] * len(projections)
    assert given[f"{stem}.1.{attention}.{out}"] == given[f"{stem}.1.mlp.{down}"] == rows


@pytest.mark.parametrize("chosen", [range(6), [1, 2, 4], [5], [0, 3]], ids=str)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("sites", [("mlp",), ("layer",)], ids="+".join)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_in_common_and_some_of_the_prompts(family: str, sites: tuple[str, ...], layer: int, chosen: list) -> None:
    model = double(family)
    ids, tokens, readout = zip(*SHARING, strict=True)
    packed = PackedPrompts.sharing(model, ids)
    assert packed.rows < sum(map(len, ids))
    run, asked = FrozenPrompts(packed, sites, layer, tokens, readout), [SHARING[n] for n in chosen]
    order = [5, 2, 0, 3, 4, 1]
    run = run.only(order).only([order.index(n) for n in chosen])
    generator = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    added = random(len(asked), 1, WIDTH).requires_grad_()
    weights = random(sum(len(positions) for *_, positions in asked), WIDTH)
    tolerance = 1e-10 if family in IN_FLOAT64 else 1e-4
    got, want = run(added), plain(model, sites, added, asked, layer)
    assert torch.allclose(got, want, rtol=0, atol=tolerance * float(want.detach().abs().max()))
    [mine], [theirs] = (torch.autograd.grad((x * weights).sum(), added) for x in (got, want))
    assert torch.allclose(mine, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


def lines_looked_at(count: int) -> int:
    """By the keys' gradients of a layer behind the edited one: of each 8 keys the lines from the first that sees one of
    them to the last (csrc/cuda/tree_attention_backward.cu)."""
    model = ke.load_model((tiny_hf("llama"), word_level()))
    prompts = [[3 + n % 40, 4 + n // 40, 5, 6, 7, 8, 9] for n in range(count)]
    packed = PackedPrompts(model, clean_runs(model, prompts))
    table = FrozenPrompts(packed, ("mlp",), 0, [3] * count, [(6,)] * count)._segments[2].tolist()
    seen: dict[int, list[int]] = {}
    for number, line in enumerate(table):
        up = line if line[0] >= 0 else None
        while up is not None:
            for block in range(up[1] // 8, -(-(up[1] + up[3]) // 8)):
                seen.setdefault(block, []).append(number)
            up = table[up[4]] if up[4] >= 0 else None
    return sum(max(lines) - min(lines) + 1 for lines in seen.values())


def test_keys_gradients_cost_what_the_prompts_do() -> None:
    """Not the square: four times the prompts are four times the work."""
    assert lines_looked_at(48) < 4.5 * lines_looked_at(12)
