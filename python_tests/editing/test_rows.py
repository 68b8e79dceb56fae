"""Rows under edits of their own against each edit applied alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import knowedit_ext as ke
from knowedit_ext.editing.edit import LowRank, describe_model, weight_is_input_first
from knowedit_ext.editing.rows import EditedRows
from knowedit_ext.model import head
from knowedit_ext.sweep.capture import clean_run
from knowedit_ext.sweep.packed import PackedPrompts

from ..support.families import FAMILIES, LAYERS, tiny_hf, tiny_model
from ..support.tokenizers import word_level
from .test_beside import Int8Linear

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17], [18, 19], [3, 4, 5, 6], [20, 21, 22, 23]]
OWN = [2, -1, 0, 2, 1, -1]  # the edit of each prompt


def linear_maps(model: ke.EditableModel, layer: int) -> list[str]:
    """Names of all of a layer's linear maps, the down projection first."""
    down = model.modules.down_projection(layer)
    inside = {id(m) for m in model.modules.layers[layer].modules()}
    named = [(n, m) for n, m in model.hf.named_modules() if id(m) in inside and getattr(m, "weight", None) is not None]
    return [n for n, m in sorted(named, key=lambda nm: nm[1] is not down) if m.weight.dim() == 2]


def random_edit(model: ke.EditableModel, ranks: dict[str, int], seed: int) -> ke.Edit:
    """Changes of random directions, large enough to change answers; ranks: by module name."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name, rank in ranks.items():
        module = model.hf.get_submodule(name)
        first = weight_is_input_first(module)
        d_in, d_out = module.weight.shape if first else module.weight.shape[::-1]
        inputs, outputs = (torch.randn(d, rank, generator=generator).double() for d in (d_in, d_out))
        scale = float(module.weight.detach().float().norm()) / float((outputs @ inputs.T).norm())
        changes[f"{name}.weight"] = LowRank(inputs * scale, outputs, first)
    return ke.Edit(changes, "test", model=describe_model(model))


def some_edits(model: ke.EditableModel) -> list[ke.Edit]:
    """Of several layers and ranks; the last changes an attention weight, too."""
    low, high = linear_maps(model, 1), linear_maps(model, 3)
    ranks = [{low[0]: 1}, {low[0]: 7, high[0]: 2}, {high[0]: 1, low[-1]: 1}]
    return [random_edit(model, by_name, seed) for seed, by_name in enumerate(ranks)]


@torch.no_grad()
def logits(model: ke.EditableModel, ids: list[int]) -> Tensor:
    return model.hf(torch.tensor([ids]), use_cache=False).logits[0]


def alone(model: ke.EditableModel, edits: list[ke.Edit], ids: list[int], own: int) -> Tensor:
    if own < 0:
        return logits(model, ids)
    with edits[own].applied(model):
        return logits(model, ids)


def assert_near(ours: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert float((ours - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


@torch.no_grad()
def packed_logits(model: ke.EditableModel, rows: EditedRows, own: list[int]) -> list[Tensor]:
    packed = PackedPrompts(model, [clean_run(model, ids) for ids in PROMPTS])
    index = torch.tensor(own).repeat_interleave(torch.tensor([len(ids) for ids in PROMPTS]))
    below = packed.run(packed.start, 0, rows.first_layer)  # shared with the unedited model
    with rows.rows(index):
        hidden = packed.run(below, rows.first_layer, model.num_layers)
    packed_rows = head.logits(model, head.final_states(model, hidden))
    return list(packed_rows.split([len(ids) for ids in PROMPTS]))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_each_edit_alone(family: str) -> None:
    model = tiny_model(family)
    edits = some_edits(model)
    rows = EditedRows(model, edits)
    assert rows.first_layer == 1
    for ours, ids, own in zip(packed_logits(model, rows, OWN), PROMPTS, OWN, strict=True):
        assert_near(ours, alone(model, edits, ids, own))
        assert (float((ours - logits(model, ids)).abs().max()) > 1e-2) == (own >= 0)  # the edits are no small matter


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_of_a_batch_equal_each_edit_alone(family: str) -> None:
    model = tiny_model(family)
    edits = some_edits(model)
    batch = torch.arange(3, 3 + 5 * 6).view(5, 6)
    own = [1, -1, 2, 0, 1]
    with torch.no_grad(), EditedRows(model, edits).rows(torch.tensor(own)):
        ours = model.hf(batch, use_cache=False).logits
    for logit, ids, edit in zip(ours, batch.tolist(), own, strict=True):
        assert_near(logit, alone(model, edits, ids, edit))


@torch.no_grad()
def test_one_long_sequence_and_generation_with_a_cache() -> None:
    model = tiny_model("gpt2")
    edits = some_edits(model)
    with EditedRows(model, edits).rows(torch.tensor([1])):
        ours = logits(model, PROMPTS[0])
    assert_near(ours, alone(model, edits, PROMPTS[0], 1))
    batch, greedy = torch.tensor([PROMPTS[0], PROMPTS[0]]), dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    with EditedRows(model, edits).rows(torch.tensor([2, 1])):
        ours = model.hf.generate(batch, **greedy)
    for line, own in zip(ours, (2, 1), strict=True):
        with edits[own].applied(model):
            assert torch.equal(line, model.hf.generate(batch[:1], **greedy)[0])


def test_hooks_are_gone_afterwards_and_weights_untouched() -> None:
    model = tiny_model("llama")
    edits = some_edits(model)
    before, bits = logits(model, PROMPTS[0]), {n: p.clone() for n, p in model.hf.named_parameters()}
    rows = EditedRows(model, edits)
    with pytest.raises(KeyError), rows.rows(torch.tensor([1])):
        raise KeyError
    with pytest.raises(ValueError, match="index of edits has 2 entries, but '.*' was called with"):
        with rows.rows(torch.tensor([1, 2])):
            logits(model, PROMPTS[0])
    assert not any(module._forward_hooks for module in model.hf.modules())
    assert torch.equal(logits(model, PROMPTS[0]), before)
    assert all(torch.equal(p, bits[n]) for n, p in model.hf.named_parameters())


def test_ranks_far_apart_are_not_padded_to_the_highest() -> None:
    model = tiny_model("gpt2")
    (name,) = linear_maps(model, 2)[:1]
    edits = [random_edit(model, {name: rank}, rank) for rank in (1, 20, 1, 3, 4, 1)]
    rows = EditedRows(model, edits)
    held = sum(f.left.numel() + f.right.numel() for factors in rows._factors.values() for f in factors)
    d_in, d_out = model.hf.get_submodule(name).weight.shape
    assert held == (1 + 1 + 1 + 20 + 4 + 4) * (d_in + d_out)
    own = [1, 3, 0, 5, 4, 2]
    for ours, ids, edit in zip(packed_logits(model, rows, own), PROMPTS, own, strict=True):
        assert_near(ours, alone(model, edits, ids, edit))


def test_quantised_modules() -> None:
    hf = tiny_hf("llama")
    for layer in hf.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
    model = ke.load_model((hf, word_level()))
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2)]
    edits = [random_edit(tiny_model("llama"), {name: 2}, seed) for seed, name in enumerate(names)]
    for ours, ids, own in zip(
        packed_logits(model, EditedRows(model, edits), [1, 0, -1, 1, 0, 0]), PROMPTS, [1, 0, -1, 1, 0, 0], strict=True
    ):
        assert_near(ours, alone(model, edits, ids, own))


def test_a_bfloat16_model_rounds_the_sum_once() -> None:
    model = ke.load_model((tiny_hf("gpt2").to(torch.bfloat16), word_level()))
    (name,) = linear_maps(model, 2)[:1]
    module, edit = model.hf.get_submodule(name), random_edit(model, {name: 2}, 0)
    x = torch.randn(1, 5, module.weight.shape[0], generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        plain = module(x)
        with EditedRows(model, [edit]).rows(torch.tensor([0, -1, 0, 0, -1])):
            ours = module(x)
    update = x[0].double() @ edit.delta(f"{name}.weight")
    update[[1, 4]] = 0
    exact = plain[0].double() + update
    assert ((ours[0].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5 * update.abs().max()).all()


def test_a_float64_model_is_computed_in_float64() -> None:
    model = ke.load_model((tiny_hf("gpt2").double(), word_level()))
    edits = some_edits(model)
    for ours, ids, own in zip(packed_logits(model, EditedRows(model, edits), OWN), PROMPTS, OWN, strict=True):
        assert_near(ours, alone(model, edits, ids, own), 1e-12)


def test_what_cannot_be_done_by_rows_is_refused() -> None:
    model = tiny_model("gpt2")
    (name,) = linear_maps(model, 2)[:1]
    fine = random_edit(model, {name: 1}, 0)
    dense = ke.Edit({f"{name}.weight": fine.delta(f"{name}.weight")}, "FT", model=describe_model(model))
    assert EditedRows.possible([fine, fine]) and not EditedRows.possible([fine, dense])
    with pytest.raises(ValueError, match=rf"edit 1 \(FT\) changes '{name}.weight' by a dense tensor.*one by one"):
        EditedRows(model, [fine, dense])
    change = fine.changes[f"{name}.weight"]
    with pytest.raises(ValueError, match="another model's"):
        EditedRows(model, [ke.Edit({f"{name}.weight": LowRank(change.inputs[1:], change.outputs, True)})])
    with pytest.raises(ValueError, match="another base"):
        EditedRows(model, [fine, ke.Edit(fine.changes, model=describe_model(model) | {"layers": 7})])
    embedding = model.hf.get_input_embeddings().weight
    factors = LowRank(torch.zeros(embedding.shape[0], 1), torch.zeros(embedding.shape[1], 1), True)
    with pytest.raises(ValueError, match="edit 0 changes 'transformer.wte.weight', which is no linear map"):
        EditedRows(model, [ke.Edit({"transformer.wte.weight": factors})])
    square = "model.layers.0.self_attn.o_proj"
    turned = LowRank(torch.zeros(32, 1), torch.zeros(32, 1), True)
    with pytest.raises(
        ValueError, match=r"edit 0: the edit takes '.*o_proj.weight' the wrong way round: it is \[d_out, d_in\]"
    ):
        EditedRows(tiny_model("llama"), [ke.Edit({f"{square}.weight": turned})])


@pytest.mark.parametrize(
    "index, error, message",
    [
        (torch.tensor([0, 3]), IndexError, "index holds 3: there are 3 edits"),
        (torch.tensor([-2]), IndexError, "index holds -2"),
        (torch.tensor([0.0]), ValueError, "index must be integers"),
        (torch.tensor([[0]]), ValueError, r"index must be integers \[rows\] or \[batch\], got torch.int64 \[1, 1\]"),
    ],
)
def test_bad_indices(index: Tensor, error: type[Exception], message: str) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(error, match=message), EditedRows(model, some_edits(model)).rows(index):
        pass
    assert not any(module._forward_hooks for module in model.hf.modules())


def test_no_edits_and_gradients() -> None:
    model = tiny_model("gpt2")
    rows = EditedRows(model, [])
    assert rows.first_layer == LAYERS
    with rows.rows(torch.tensor([-1])):
        assert torch.equal(logits(model, PROMPTS[0]), alone(model, [], PROMPTS[0], -1))
    layer: nn.Module = model.modules.down_projection(1)
    with (
        pytest.raises(RuntimeError, match="torch.no_grad"),
        EditedRows(model, some_edits(model)).rows(torch.tensor([0])),
    ):
        layer(torch.ones(1, 2, layer.weight.shape[0], requires_grad=True))
