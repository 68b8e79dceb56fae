"""MEND as published, written plainly: one record at a time, whole passes, gradients of all weights, dense changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

Tensors = Mapping[str, torch.Tensor]


def gradient_rows(hf: nn.Module, ids: Sequence[int], count: int, names: Sequence[str]) -> list[tuple]:
    """(inputs, output gradients) of each module for the mean NLL of the last `count` tokens (mend.py, edit)."""
    read, given, handles = {}, {}, []
    for name in names:

        def keep(m: nn.Module, args: tuple, out: torch.Tensor, name: str = name) -> None:
            out.retain_grad()
            read[name], given[name] = args[0].detach()[0], out

        handles.append(hf.get_submodule(name.removesuffix(".weight")).register_forward_hook(keep))
    logp = hf(torch.tensor([list(ids)]), use_cache=False).logits[0, :-1].log_softmax(-1)
    (-logp[torch.arange(len(ids) - 1), list(ids)[1:]][-count:].mean()).backward()
    for handle in handles:
        handle.remove()
    hf.zero_grad()
    return [(read[name], given[name].grad[0]) for name in names]


def changes(tensors: Tensors, rows: Sequence[tuple], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Dense changes [d_in, d_out] from trained statistics (mend.py, GradientTransform)."""
    seen: dict[str, int] = {}
    gradients = {}
    for number, (name, (x, d)) in enumerate(zip(names, rows, strict=True)):
        shape = f"mend.({x.shape[1]}, {d.shape[1]})"
        mode = seen.get(shape, 0)
        seen[shape] = mode + 1
        kept = (x != 0).any(1) & (d != 0).any(1)
        u = (x[kept] - tensors[f"{shape}.u_mean"]) / (tensors[f"{shape}.u_std"] + 1e-7)
        v = (d[kept] - tensors[f"{shape}.v_mean"]) / (tensors[f"{shape}.v_std"] + 1e-7)
        z = torch.cat([u, v], 1)
        for layer in (f"{shape}.mlp.layers.0.", f"{shape}.mlp.layers.1."):
            inner = (tensors[layer + "u"] @ (tensors[layer + "v"] @ z.T)).T + tensors[layer + "bias"]
            inner = inner * tensors[layer + "mode_scale.weight"][mode] + tensors[layer + "mode_shift.weight"][mode]
            z = z + inner.clamp(min=0)
        left, right = z.split([x.shape[1], d.shape[1]], 1)
        gradients[name] = tensors["edit_lrs"][number] * left.T @ right
    return gradients


def iteration(
    hf: nn.Module,
    tensors: Tensors,
    names: Sequence[str],
    edit: tuple[Sequence[int], int],
    outer: tuple[Sequence[int], int],
    loc: Sequence[Sequence[int]],
    cedit: float,
    cloc: float,
    accumulate: int,
) -> tuple[float, float]:
    """The two losses of an iteration, and gradients in `tensors`' parameters (trainer.py, edit_step)."""
    say = lambda ids: hf(torch.tensor([list(ids)]), use_cache=False).logits[0].log_softmax(-1)  # noqa: E731
    with torch.no_grad():
        before = [say(ids) for ids in loc]
    changed = changes(tensors, gradient_rows(hf, *edit, names), names)
    weights = dict(hf.named_parameters())
    edited = {name: weights[name].detach() + changed[name] for name in names}

    def call(ids: Sequence[int]) -> torch.Tensor:
        given = (torch.tensor([list(ids)]),)
        return torch.func.functional_call(hf, edited, given, {"use_cache": False}).logits[0].log_softmax(-1)

    ids, count = outer
    nll = -call(ids)[torch.arange(len(ids) - 1), list(ids)[1:]][-count:].mean()
    kl = torch.cat([(b.exp() * (b - call(t))).sum(-1) for b, t in zip(before, loc, strict=True)]).mean()
    ((cedit * nll + cloc * kl) / accumulate).backward()
    hf.zero_grad()
    return float(nll), float(kl)
