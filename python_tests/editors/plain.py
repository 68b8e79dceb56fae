"""MEND and EFK written plainly from their definitions: whole forward passes, dense gradients, dense changes.

Tensors by their published names; knows nothing of packed rows, factors or the package's networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

import knowedit_ext as ke

Tensors = Mapping[str, torch.Tensor]


def texts(model: ke.EditableModel, requests: Sequence[ke.EditRequest]) -> list[tuple[list[int], int]]:
    """(ids of prompt and target, how many are the target's)."""
    texts = []
    for request in requests:
        prompt = request.prompt.replace("{}", request.subject)
        ids = model.tokenizer(prompt + request.target_new).input_ids
        texts.append((ids, len(ids) - len(model.tokenizer(prompt).input_ids)))
    return texts


def rows_and_gradient(
    model: ke.EditableModel, requests: Sequence[ke.EditRequest], names: Sequence[str]
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """By weight (inputs [tokens, d_in], gradients [tokens, d_out], dense gradient) of the mean NLL of target tokens."""
    hf, read, given, handles = model.hf, {n: [] for n in names}, {n: [] for n in names}, []
    for name in names:
        module = hf.get_submodule(name.removesuffix(".weight"))

        def keep(m: nn.Module, args: tuple, out: torch.Tensor, name: str = name) -> None:
            out.retain_grad()
            read[name].append(args[0].detach()[0])
            given[name].append(out)

        handles.append(module.register_forward_hook(keep))
    for name in names:
        hf.get_parameter(name).requires_grad_(True)
    loss, total = 0.0, 0
    for ids, count in texts(model, requests):
        logp = hf(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        loss = loss - logp[torch.arange(len(ids) - 1), ids[1:]][-count:].sum()
        total += count
    (loss / total).backward()
    for handle in handles:
        handle.remove()
    rows = {}
    for name in names:
        weight = hf.get_parameter(name)
        rows[name] = torch.cat(read[name]), torch.cat([out.grad[0] for out in given[name]]), weight.grad.clone()
        weight.grad = None
    hf.zero_grad()
    return rows


def mend_deltas(
    model: ke.EditableModel, tensors: Tensors, names: Sequence[str], requests: Sequence[ke.EditRequest]
) -> dict[str, torch.Tensor]:
    """Dense changes, token by token."""
    changes = {}
    seen: dict[str, int] = {}
    for number, (name, (inputs, gradients, dense)) in enumerate(rows_and_gradient(model, requests, names).items()):
        shape = f"mend.({inputs.shape[1]}, {gradients.shape[1]})"
        mode = seen.get(shape, 0)
        seen[shape] = mode + 1
        change = torch.zeros(inputs.shape[1], gradients.shape[1])
        for x, d in zip(inputs, gradients, strict=True):
            if not x.any() or not d.any():
                continue
            u = (x - tensors[f"{shape}.u_mean"]) / (tensors[f"{shape}.u_std"] + 1e-7)
            v = (d - tensors[f"{shape}.v_mean"]) / (tensors[f"{shape}.v_std"] + 1e-7)
            z = torch.cat([u, v])
            for layer in (f"{shape}.mlp.layers.0.", f"{shape}.mlp.layers.1."):
                inner = tensors[layer + "u"] @ (tensors[layer + "v"] @ z) + tensors[layer + "bias"]
                inner = inner * tensors[layer + "mode_scale.weight"][mode] + tensors[layer + "mode_shift.weight"][mode]
                z = z + inner.clamp(min=0)
            change += torch.outer(z[: len(x)], z[len(x) :])
        change = tensors["edit_lrs"][number] * change
        changes[name] = change if dense.shape == change.shape and conv1d(model, name) else change.T
    return changes


def efk_deltas(
    model: ke.EditableModel, tensors: Tensors, names: Sequence[str], request: ke.EditRequest
) -> dict[str, torch.Tensor]:
    ((ids, _),) = texts(model, [request])
    embedded = tensors["editor.condition.embedding.weight"][ids]
    hidden = tensors["editor.condition.lstm._module.weight_hh_l0"].shape[1]
    lstm = nn.LSTM(embedded.shape[1], hidden, bidirectional=True)
    lstm.load_state_dict({k.rpartition(".")[2]: v for k, v in tensors.items() if ".lstm._module." in k})
    _, (last, _) = lstm(embedded[:, None])
    linear = "editor.condition.linear._linear_layers.0."
    condition = torch.tanh(tensors[linear + "weight"] @ torch.cat([last[0, 0], last[1, 0]]) + tensors[linear + "bias"])
    changes = {}
    for name, (_, _, gradient) in rows_and_gradient(model, [request], names).items():
        conditioned = condition
        for number in "02":
            part = f"editor.conditioners.{name.replace('.', '_')}_conditioner.conditioners.{number}."
            v = tensors[part + "weight_v"]
            conditioned = (tensors[part + "weight_g"] * v / v.norm(dim=1, keepdim=True)) @ conditioned + tensors[
                part + "bias"
            ]
            conditioned = conditioned.tanh() if number == "0" else conditioned
        r, c = gradient.shape
        cola, rowa, colb, rowb, norm = conditioned.split([c, r, c, r, 1])
        a, b = torch.outer(rowa.softmax(0), cola), torch.outer(rowb.softmax(0), colb)
        changes[name] = (norm.sigmoid() * (gradient * a + b)).detach()
    return changes


def conv1d(model: ke.EditableModel, name: str) -> bool:
    return type(model.hf.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"
