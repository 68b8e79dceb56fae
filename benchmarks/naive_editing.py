"""The published editing loops, written plainly: `compute_z` for one request at a time, and MEMIT's insertion.

Everything goes through whole forward passes of padded batches with hooks, as memit's compute_z.py and memit_main.py do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Text:
    """A prompt: ids with the target's tokens but the last behind it, the subject's last token, the target's ids."""

    ids: tuple[int, ...]
    lookup: int
    target: tuple[int, ...] = ()


def padded(texts: Sequence[Text], device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(len(text.ids) for text in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        mask[row, : len(text.ids)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def untuple(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def compute_z(
    hf: nn.Module,
    layer: nn.Module,
    rewriting: Sequence[Text],
    kl: Text,
    steps: int,
    rate: float,
    decay: float,
    clamp: float,
    kl_factor: float,
) -> torch.Tensor:
    """The value [hidden] of one request (memit/compute_z.py:13-183)."""
    texts = [*rewriting, kl]
    batch = padded(texts, hf.device)
    delta = torch.zeros(hf.config.hidden_size, device=hf.device, requires_grad=True)
    initial: list[torch.Tensor] = []

    def add(module: nn.Module, args: tuple, output: Any) -> Any:
        hidden = untuple(output)
        if not initial:
            initial.append(hidden[0, texts[0].lookup].detach().clone())
        hidden = hidden.clone()
        for row, text in enumerate(texts):
            hidden[row, text.lookup] += delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    optimiser = torch.optim.Adam([delta], lr=rate)
    first = None
    handle = layer.register_forward_hook(add)
    for step in range(steps):
        optimiser.zero_grad()
        logp = hf(**batch).logits.log_softmax(-1)  # [prompts, tokens, vocab]
        current = logp[-1, kl.lookup]
        first = current.detach() if first is None else first
        losses = []
        for row, text in enumerate(rewriting):
            places = torch.arange(len(text.ids) - len(text.target), len(text.ids))
            losses.append(-logp[row, places, torch.tensor(text.target)].mean())
        divergence = nn.functional.kl_div(first[None], current[None], log_target=True, reduction="batchmean")
        loss = torch.stack(losses).mean() + kl_factor * divergence + decay * delta.norm() / initial[0].norm() ** 2
        if loss < 5e-2 or step == steps - 1:
            break
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            most = clamp * initial[0].norm()
            if delta.norm() > most:
                delta.copy_(delta * most / delta.norm())
    handle.remove()
    return (initial[0] + delta).detach()


@torch.no_grad()
def insert(
    hf: nn.Module,
    layers: Sequence[nn.Module],
    projections: Sequence[nn.Module],
    groups: Sequence[Sequence[Sequence[Text]]],
    values: torch.Tensor,
    moments: Sequence[torch.Tensor],
    weight: float,
) -> list[torch.Tensor]:
    """MEMIT's changes of the weights, in their own layout, layer by layer (memit/memit_main.py:151-223).

    groups[request][group]: its prompts, the bare one first. Batches of 128 prompts, as published.
    """
    before = [projection.weight.detach().clone() for projection in projections]
    changes = []

    def at_lookups(module: nn.Module, texts: Sequence[Text], of_input: bool) -> torch.Tensor:
        rows = []
        for first in range(0, len(texts), 128):
            part = texts[first : first + 128]
            kept: list[torch.Tensor] = []
            hook = lambda _m, args, output: kept.append(args[0] if of_input else untuple(output))  # noqa: B023, E731
            handle = module.register_forward_hook(hook)
            hf(**padded(part, hf.device))
            handle.remove()
            rows += [kept[0][row, text.lookup] for row, text in enumerate(part)]
        return torch.stack(rows)

    for number, projection in enumerate(projections):
        flat = [text for request in groups for group in request for text in group]
        inputs = iter(at_lookups(projection, flat, True).double())
        keys = [
            torch.stack([torch.stack([next(inputs) for _ in group]).mean(0) for group in request]).mean(0)
            for request in groups
        ]
        reached = at_lookups(layers[-1], [request[0][0] for request in groups], False).double()
        residual = (values.double() - reached).T / (len(projections) - number)
        k = torch.stack(keys, 1)
        adjusted = torch.linalg.solve(weight * moments[number].double() + k @ k.T, k)
        change = residual @ adjusted.T
        change = change if isinstance(projection, nn.Linear) else change.T  # Conv1D: [d_in, d_out]
        projection.weight.copy_(before[number] + change.float())
        changes.append(change)
    for projection, weights in zip(projections, before, strict=True):
        projection.weight.copy_(weights)
    return changes


def rome(
    hf: nn.Module,
    mlp: nn.Module,
    projection: nn.Module,
    rewriting: Sequence[Text],
    prompts: Sequence[Text],
    kl: Text,
    inverse: torch.Tensor,
    params: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(left [d_in], right [d_out]) whose outer product changes a Conv1D's weight (rome/compute_u.py, compute_v.py),
    with google/belief-localization's loss.

    rewriting: the prompt in its contexts, with the target; prompts: without it, the bare one first; inverse: of the
    second moment of the layer's keys.
    """
    value, initial = _rome_value(hf, mlp, rewriting, kl, params)
    keys: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        keys.append(args[0].detach())
        outputs.append(output.detach())

    handle = projection.register_forward_hook(keep)
    with torch.no_grad():
        hf(**padded(prompts, hf.device))
        hf(**padded(prompts[:1], hf.device))
    handle.remove()
    key = torch.stack([keys[0][row, text.lookup] for row, text in enumerate(prompts)]).mean(0)
    left = inverse @ key
    left = left / left.norm()
    at = prompts[0].lookup
    now, reached = keys[1][0, at], outputs[1][0, at]
    return left, (initial + value - reached) / (now @ left)


def _rome_value(
    hf: nn.Module, mlp: nn.Module, rewriting: Sequence[Text], kl: Text, params: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    texts = [*rewriting, kl]
    batch = padded(texts, hf.device)
    delta = torch.zeros(hf.config.hidden_size, device=hf.device, requires_grad=True)
    initial: list[torch.Tensor] = []

    def add(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if not initial:
            initial.append(output[0, texts[0].lookup].detach().clone())
        output = output.clone()
        for row, text in enumerate(texts):
            output[row, text.lookup] += delta
        return output

    optimiser = torch.optim.Adam([delta], lr=params.v_lr)
    handle, first = mlp.register_forward_hook(add), None
    for step in range(params.v_num_grad_steps):
        optimiser.zero_grad()
        logp = hf(**batch).logits.log_softmax(-1)
        current = logp[-1, kl.lookup]
        first = current.detach() if first is None else first
        losses = []
        for row, text in enumerate(rewriting):
            places = torch.arange(len(text.ids) - len(text.target), len(text.ids))
            losses.append(-logp[row, places, torch.tensor(text.target)].mean())
        divergence = nn.functional.kl_div(first[None], current[None], log_target=True, reduction="batchmean")
        decay = params.v_weight_decay * delta.norm() / initial[0].norm() ** 2
        loss = torch.stack(losses).mean() + params.kl_factor * divergence + decay
        if step == params.v_num_grad_steps - 1:
            break
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            most = params.clamp_norm_factor * initial[0].norm()
            if delta.norm() > most:
                delta.copy_(delta * most / delta.norm())
    handle.remove()
    return delta.detach(), initial[0]
