"""UltraEdit beside its update written again in float64, from one backward pass of the model itself for each request."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import knowedit_ext as ke
from knowedit_ext.editing.request import EditRequest
from knowedit_ext.editing.running import Running

from ..support.families import FAMILIES
from ..support.unchanged import assert_unchanged, snapshot
from .models import editable, fresh
from .plain import down_projection, spell, weight_name

LAYERS = (1, 2)
REQUESTS = [
    EditRequest("w5 {} w9 w10", "w3 w7", "w20"),
    EditRequest("{} w9", "w33", "w22 w24 w26"),
    EditRequest("w17 w18 {}", "w45 w46", "w27 w20"),
    EditRequest("w6 {} w8 w9 w12", "w41", "w25"),
]
PARAMS = ke.UltraEditParams(layers=LAYERS, lr=1e-2, batch_size_once=2)


def seen_by(model: ke.EditableModel, module: nn.Module, batch: list[EditRequest], mean: bool, every: bool = False):
    """keys and gradients [tokens, d] of the loss of a batch, whose requests are run one by one."""
    hf, rows, losses, passes = model.hf, [], [], []

    def keep(_module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        output.retain_grad()
        passes.append((args[0].detach(), output))

    for request in batch:
        ids, _ = spell(model, request)
        target = model.tokenizer(request.target_new).input_ids
        handle = module.register_forward_hook(keep)
        with torch.enable_grad():
            embedded = model.modules.embedding(torch.tensor([ids + target[:-1]]))
            logits = hf(inputs_embeds=embedded.detach().requires_grad_(), use_cache=False).logits[0]
        handle.remove()
        at = torch.arange(len(ids) - 1, len(ids) - 1 + len(target))
        losses += list(-logits.log_softmax(-1)[at, target])
        rows.append(torch.arange(len(logits)) if every else at)
    (torch.stack(losses).mean() if mean else sum(losses)).backward()
    keys = torch.cat([read.reshape(-1, read.shape[-1])[at] for (read, _), at in zip(passes, rows, strict=True)])
    grads = torch.cat([out.grad.reshape(-1, out.shape[-1])[at] for (_, out), at in zip(passes, rows, strict=True)])
    hf.zero_grad(set_to_none=True)
    return keys.double(), grads.double()


def change(keys: torch.Tensor, grads: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, lr: float) -> torch.Tensor:
    """dW [d_in, d_out] by the d x d system of the released code."""
    normal = torch.where(std > 1e-12, (torch.cat([keys, grads], 1) - mean) / std, 0.0)
    read, wanted = normal[:, : keys.shape[1]], normal[:, keys.shape[1] :]
    values = -lr * (read * read).sum(1, keepdim=True) * wanted
    eye = torch.eye(keys.shape[1], dtype=torch.float64)
    return torch.linalg.solve(keys.T @ keys + eye, keys.T @ values)


def close(edit: ke.Edit, model: ke.EditableModel, layer: int, want: torch.Tensor) -> None:
    want = want if not isinstance(down_projection(model, layer), nn.Linear) else want.T
    got = edit.delta(weight_name(model, layer))
    assert (got - want).norm() <= 2e-3 * want.norm()


@pytest.mark.parametrize("token", ["ans", "mask"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("gemma3")])
def test_equals_a_float64_restatement(family: str, token: str) -> None:
    """One normaliser for each module, over all that was seen: the first edit's, then both edits'."""
    model = fresh(family)
    before, earlier, kept = snapshot(model.hf), [], {layer: [] for layer in LAYERS}
    for batch in (REQUESTS[:2], REQUESTS[2:]):
        edit = ke.ultraedit(model, batch, replace(PARAMS, token=token), earlier=earlier)
        for layer in LAYERS:
            keys, grads = seen_by(model, down_projection(model, layer), batch, mean=False, every=token == "mask")
            kept[layer].append(torch.cat([keys, grads], 1))
            rows = torch.cat(kept[layer])
            close(edit, model, layer, change(keys, grads, rows.mean(0), rows.std(0), PARAMS.lr))
        edit.apply(model)
        earlier.append(edit)
    for edit in reversed(earlier):
        edit.revert(model)
    assert_unchanged(before, model.hf)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_as_released(family: str) -> None:
    """Mini-batches, the longest requests first; one running normaliser for modules of one shape, in nets.py's words."""
    model = editable(family)
    length = lambda r: len(spell(model, r)[0]) + len(model.tokenizer(r.target_new).input_ids) - 1  # noqa: E731
    ordered = sorted(REQUESTS, key=length, reverse=True)
    parts = {layer: [] for layer in LAYERS}
    count, mean, var = 0, 0.0, 0.0
    for batch in (ordered[:2], ordered[2:]):
        for layer in LAYERS:
            parts[layer].append(seen_by(model, down_projection(model, layer), batch, mean=True))
            x = torch.cat(parts[layer][-1], 1)
            total, delta = count + len(x), x.mean(0) - mean
            mean = mean + len(x) * delta / total
            var = var + len(x) * x.var(0) + count * len(x) * delta**2 / total
            count = total
    edit = ke.ultraedit(model, REQUESTS, PARAMS, compat="reference")
    for layer in LAYERS:
        keys, grads = (torch.cat(each) for each in zip(*parts[layer], strict=True))
        eps = torch.finfo(torch.float32).eps
        close(edit, model, layer, change(keys, grads, mean, (var / (count - 1)).sqrt() + eps, PARAMS.lr))


def test_batches_and_order_make_no_difference(monkeypatch) -> None:
    model = editable("llama")
    edit = ke.ultraedit(model, REQUESTS, PARAMS)
    monkeypatch.setattr("knowedit_ext.editing.methods.ultraedit.default_max_rows", lambda model: 4)
    other = ke.ultraedit(model, REQUESTS[::-1], replace(PARAMS, batch_size_once=1))
    for name in edit.changes:
        assert (edit.delta(name) - other.delta(name)).norm() <= 1e-3 * edit.delta(name).norm()


def test_named_modules_and_files(tmp_path) -> None:
    model = editable("llama")
    names = ("model.layers.1.mlp.gate_proj", "model.layers.2.mlp.up_proj")
    params = ke.UltraEditParams.from_dict(dict(alg_name="ULTRAEDIT", inner_params=list(names), lr="1e-2", token="mask"))
    assert params.layers == (1, 2)
    edit = ke.ultraedit(model, REQUESTS, params)
    assert list(edit.changes) == [f"{name}.weight" for name in names]
    edit.save(tmp_path / "edit.safetensors")
    again = ke.Edit.load(tmp_path / "edit.safetensors")
    assert all(torch.equal(again.statistics[name], edit.statistics[name]) for name in names)
    one, two = (ke.ultraedit(model, part, params) for part in (REQUESTS[:2], REQUESTS[2:]))
    joint = ke.Edit.merge([one, two]).statistics
    assert all(torch.allclose(joint[name], edit.statistics[name], rtol=1e-3, atol=1e-9) for name in names)


def test_one_step_goes_the_right_way() -> None:
    model = fresh("llama")
    loss = lambda: float(-sum(logp(model, request) for request in REQUESTS))  # noqa: E731
    before = loss()
    with ke.ultraedit(model, REQUESTS, replace(PARAMS, lr=1e-3)).applied(model):
        assert loss() < before


@torch.no_grad()
def logp(model: ke.EditableModel, request: EditRequest) -> torch.Tensor:
    ids, _ = spell(model, request)
    target = model.tokenizer(request.target_new).input_ids
    logits = model.hf(torch.tensor([ids + target[:-1]]), use_cache=False).logits[0, len(ids) - 1 :]
    return logits.log_softmax(-1)[range(len(target)), target].sum()


def test_what_is_refused() -> None:
    model, one = fresh("gpt2"), REQUESTS[:1]
    before = snapshot(model.hf)
    cases = [
        (REQUESTS[:1], PARAMS, {}, "one token is all that UltraEdit has seen"),
        (REQUESTS, replace(PARAMS, batch_size_once=1), dict(compat="reference"), "a mini-batch of one token"),
        (REQUESTS, replace(PARAMS, layers=(9,)), {}, "layer 9 is out of range"),
        (REQUESTS, ke.UltraEditParams(inner_params=("h.1.nothing",)), {}, "has no module 'h.1.nothing'"),
        (REQUESTS, PARAMS, dict(earlier=[ke.Edit({}, "memit")]), r"earlier\[0\] \(memit\) keeps no statistics of"),
    ]
    for requests, params, options, message in cases:
        with pytest.raises(ValueError, match=message):
            ke.ultraedit(model, requests, params, **options)
    with pytest.raises(ValueError, match="layers are .*inner_params are of layers"):
        ke.UltraEditParams(layers=(2,), inner_params=("a.1.b",))
    with pytest.raises(ValueError, match="expected a module of one layer"):
        ke.UltraEditParams(inner_params=("lm_head",))
    assert_unchanged(before, model.hf)
    assert ke.ultraedit(model, one * 1, PARAMS, earlier=[ke.ultraedit(model, REQUESTS, PARAMS)]).changes


@pytest.mark.parametrize("names", [True, 7, float("nan"), "a.1.b", ["a.1.b", 3], {"a.1.b": 1}, [None]])
def test_names_of_another_type(names: object) -> None:
    with pytest.raises(ValueError, match="inner_params"):
        ke.UltraEditParams(inner_params=names)


@pytest.mark.parametrize("parts", [[1, 1, 3], [4, 1], [2, 2, 2, 2]])
def test_running(parts: list[int]) -> None:
    rows = torch.randn(sum(parts), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 100
    joined = Running.join(Running.of(part) for part in rows.split(parts))
    again = Running.from_tensor(joined.tensor())
    assert again.count == len(rows) and torch.allclose(again.mean, rows.mean(0), rtol=1e-13)
    assert torch.allclose(again.squares / (len(rows) - 1), rows.var(0), rtol=1e-11)
