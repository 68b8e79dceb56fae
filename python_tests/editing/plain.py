"""The published editing loops written plainly: hooks, whole prompts, one edit at a time, `torch.optim.Adam`.

Knows nothing of segments, packed rows or the package's spans. Prompts are those of `support.tokenizers.word_level`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

import knowedit_ext as ke
from knowedit_ext.editing.params import EditParams
from knowedit_ext.editing.request import EditRequest
from knowedit_ext.moments import Moments

from ..support.oracle import Plain

NAMES = ("down_proj", "c_proj", "fc_out", "dense_4h_to_h", "fc2", "w2")


def down_projection(model: ke.EditableModel, layer: int) -> nn.Module:
    named = dict(Plain(model.hf).layers[layer].named_modules())
    named = {name: module for name, module in named.items() if not name.startswith(("attn.", "self_attn."))}
    return next(named[name] for last in NAMES for name in named if name.rsplit(".", 1)[-1] == last)


def weight_name(model: ke.EditableModel, layer: int) -> str:
    module = down_projection(model, layer)
    return next(name for name, parameter in model.hf.named_parameters() if parameter is module.weight)


def spell(model: ke.EditableModel, request: EditRequest, context: str = "{}") -> tuple[list[int], range]:
    """Token ids of the prompt in its context, and the tokens of its subject."""
    count = lambda text: len(model.tokenizer(text).input_ids)  # noqa: E731
    front, back = context.split("{}")
    before, after = request.prompt.split("{}")
    ids = model.tokenizer(front + before + request.subject + after + back).input_ids
    return ids, range(count(front + before), count(front + before + request.subject))


def place(ids: Sequence[int], subject: range, fact_token: str) -> int:
    return {
        "subject_last": subject[-1],
        "subject_first": subject[0],
        "subject_first_after_last": subject[-1] + 1,
        "last": len(ids) - 1,
    }[fact_token]


@contextmanager
def hooked(module: nn.Module, act: Callable[[tuple, torch.Tensor], torch.Tensor | None]):
    """`act(args, output)` sees what goes in and comes out; what it returns replaces the output."""

    def hook(_module: nn.Module, args: tuple, output: Any) -> Any:
        changed = act(args, output[0] if isinstance(output, tuple) else output)
        return output if changed is None else (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def plain_noise(model: ke.EditableModel, request: EditRequest, subject: range) -> list[torch.Tensor | None]:
    """Of each draw [subject tokens, hidden]; a request without noise has one draw of none."""
    if request.noise is None:
        return [None]
    size = (request.noise.samples, len(subject), model.hidden_size)
    return list(request.noise.level * torch.from_numpy(np.random.RandomState(request.noise.seed).randn(*size)))


@contextmanager
def noised(model: ke.EditableModel, noises: Sequence[tuple[range, torch.Tensor | None]]):
    """Row by row what is added to the embeddings of which tokens."""

    def add(args: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        for row, (tokens, noise) in enumerate(noises):
            if noise is not None:
                output[row, list(tokens)] = (output[row, list(tokens)].double() + noise).to(output.dtype)
        return output

    with hooked(model.hf.get_input_embeddings(), add):
        yield


@dataclass
class PlainValue:
    value: torch.Tensor  # [hidden]
    initial: torch.Tensor
    losses: list[float]
    norms: list[float]  # of the change, as each loss was computed


def plain_value(
    model: ke.EditableModel,
    request: EditRequest,
    contexts: Sequence[str],
    params: EditParams,
    site: str,
    layer: int,
    beside: str | None = None,
    rule: Callable[[torch.Tensor, torch.Tensor], tuple[bool, float]] | None = None,
) -> PlainValue:
    """rome/compute_v.py and memit/compute_z.py: right-padded prompts, and one forward and backward pass a step.

    beside: a site with a delta of its own (PMET's compute_zs.py). rule: (log-probabilities of all words [prompts,
    targets, vocab], the KL term) -> whether that is all, and what the target's loss weighs from then on.

    A request's noise: every prompt, the KL prompt too, under every draw; losses and the initial value are means.
    """
    hf, target = model.hf, model.tokenizer(request.target_new).input_ids
    rows, places, scored, noises = [], [], [], []
    for context in contexts:
        ids, subject = spell(model, request, context)
        for noise in plain_noise(model, request, subject):
            rows.append(ids + target[:-1])
            places.append(place(ids, subject, params.fact_token))
            scored.append([len(ids) - 1 + n for n in range(len(target))])
            noises.append((subject, noise))
    kl_ids, subject = spell(model, EditRequest("{} is a", request.subject, request.target_new))
    draws = plain_noise(model, request, subject)
    for noise in draws:
        rows.append(kl_ids)
        places.append(place(kl_ids, subject, params.fact_token))
        noises.append((subject, noise))
    longest = max(map(len, rows))
    inputs = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    sites = [site] if beside is None else [site, beside]
    deltas = {where: torch.zeros(model.hidden_size, dtype=hf.dtype, requires_grad=True) for where in sites}
    delta = deltas[site]
    every, initial, seen = range(len(rows)), {}, {}

    def add(args: tuple, output: torch.Tensor, where: str) -> torch.Tensor:
        shape = output.shape
        output = output.view(len(rows), -1, shape[-1])  # OPT's MLP puts out rows
        initial.setdefault(where, output[: len(draws), places[0]].detach().mean(0))
        output = output.clone()
        output[every, places] = output[every, places] + deltas[where]
        return output.view(shape)

    def read(args: tuple, output: torch.Tensor) -> None:
        seen["read"] = output

    plain = Plain(hf)
    top = plain.layers[-1]
    early = site == "layer" and params.v_loss_layer is not None and params.v_loss_layer < len(plain.layers) - 1
    if early:
        top = plain.layers[max(params.v_loss_layer, layer)]
    optimiser, first = torch.optim.Adam(list(deltas.values()), lr=params.v_lr), None
    losses, norms, factor = [], [], 1.0
    for step in range(params.v_num_grad_steps):
        optimiser.zero_grad()
        with ExitStack() as stack:
            for where in sites:
                stack.enter_context(hooked(plain.module(where, layer), partial(add, where=where)))
            stack.enter_context(hooked(top, read))
            stack.enter_context(noised(model, noises))
            logits = hf(inputs, use_cache=False).logits
        if early:
            logits = hf.get_output_embeddings()(model.modules.final_norm(seen["read"]))
        logp = logits.log_softmax(-1)
        nll = -torch.stack([logp[n, at, target].mean() for n, at in enumerate(scored)]).mean()
        kl_now = logp[-len(draws) :, places[-1]]
        first = kl_now.detach().clone() if first is None else first
        kl = torch.nn.functional.kl_div(first, kl_now, log_target=True, reduction="batchmean")
        decay = params.v_weight_decay * sum(deltas[w].norm() / initial[w].norm() ** 2 for w in sites)
        wanted = torch.exp(-nll) if request.minimise else nll
        loss = factor * wanted + params.kl_factor * kl + decay
        losses.append(float(loss.detach()))
        norms.append(float(delta.detach().norm()))
        done = False
        if rule is not None:
            done, factor = rule(torch.stack([logp[n, at] for n, at in enumerate(scored)]), params.kl_factor * kl)
        if done or (loss < 5e-2 and not request.minimise) or step == params.v_num_grad_steps - 1:
            break
        loss.backward()
        optimiser.step()
        for where, moved in deltas.items():
            most = params.clamp_norm_factor * initial[where].norm()
            if moved.norm() > most:
                with torch.no_grad():
                    moved.mul_(most / moved.norm())
    hf.zero_grad(set_to_none=True)
    return PlainValue(initial[site] + delta.detach(), initial[site], losses, norms)


@torch.no_grad()
def plain_key(
    model: ke.EditableModel, request: EditRequest, context: str, layer: int, fact_token: str = "subject_last"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input [d_in] and output [hidden] of the down projection, from a forward pass over the whole prompt."""
    ids, subject = spell(model, request, context)
    seen = []
    with hooked(down_projection(model, layer), lambda args, output: seen.extend((args[0], output))):
        model.hf(torch.tensor([ids]), use_cache=False)
    return tuple(x.reshape(len(ids), -1)[place(ids, subject, fact_token)] for x in seen)


@torch.no_grad()
def plain_state(model: ke.EditableModel, request: EditRequest, layer: int) -> torch.Tensor:
    """[hidden] behind `layer` at the subject's last token of the bare prompt."""
    ids, subject = spell(model, request)
    seen = []
    with hooked(Plain(model.hf).layers[layer], lambda args, output: seen.append(output)):
        model.hf(torch.tensor([ids]), use_cache=False)
    return seen[0].reshape(len(ids), -1)[subject[-1]]


def plain_group_key(
    model: ke.EditableModel, request: EditRequest, groups: Sequence[Sequence[str]], layer: int
) -> torch.Tensor:
    """The mean over groups of the means over their templates, [d_in] in float64."""
    means = [torch.stack([plain_key(model, request, c, layer)[0].double() for c in group]).mean(0) for group in groups]
    return torch.stack(means).mean(0)


@torch.no_grad()
def plain_memit(
    model: ke.EditableModel,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    weight: float,
    covariance: dict[int, torch.Tensor],
    groups: Sequence[Sequence[str]],
    values: torch.Tensor,
    kept: Sequence[EditRequest] = (),
    solve: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """memit_main.py's insertion loop: changes in the weights' own shape, by name; the model is left as it was.

    kept: facts whose keys, as they are before this edit, count with the known ones: their K K^T joins the covariance.
    solve: what else the residuals are multiplied by, from a layer's keys [d_in, n].
    """
    changes, before = {}, {}
    kept_keys = {layer: [plain_group_key(model, request, groups, layer) for request in kept] for layer in layers}
    for number, layer in enumerate(layers):
        keys = torch.stack([plain_group_key(model, request, groups, layer) for request in requests], dim=1)
        now = torch.stack([plain_state(model, request, layers[-1]) for request in requests], dim=1).double()
        known = weight * covariance[layer].double()
        for key in kept_keys[layer]:
            known += torch.outer(key, key)
        adjusted = solve(layer, keys) if solve else torch.linalg.solve(known + keys @ keys.T, keys)
        change = ((values.T.double() - now) / (len(layers) - number)) @ adjusted.T  # [d_out, d_in]
        module, name = down_projection(model, layer), weight_name(model, layer)
        change = change if isinstance(module, nn.Linear) else change.T
        before[name] = module.weight.clone()
        module.weight += change.to(module.weight.dtype)
        changes[name] = change
    with ExitStack() as stack:
        for layer in layers:
            module = down_projection(model, layer)
            stack.callback(module.weight.copy_, before[weight_name(model, layer)])
    return changes


@torch.no_grad()
def covariance(model: ke.EditableModel, layers: Sequence[int], tokens: int = 600) -> dict[int, torch.Tensor]:
    """E[k k^T] over random text, in float64: full rank for the tiny models."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 60, (tokens // 20, 20), generator=generator)
    matrices: dict[int, torch.Tensor] = {}
    with ExitStack() as stack:
        for layer in layers:

            def keep(args: tuple, output: torch.Tensor, layer: int = layer) -> None:
                keys = args[0].reshape(-1, args[0].shape[-1]).double()
                matrices[layer] = keys.T @ keys / len(keys)

            stack.enter_context(hooked(down_projection(model, layer), keep))
        model.hf(ids, use_cache=False)
    return matrices


def moments_of(model: ke.EditableModel, layers: Sequence[int], tokens: int = 600) -> Moments:
    matrices = covariance(model, layers, tokens)
    return Moments.from_arrays({layer: (matrix, tokens) for layer, matrix in matrices.items()})


@torch.no_grad()
def probability(model: ke.EditableModel, request: EditRequest, context: str = "{}") -> float:
    """p(target) behind the prompt, the product over its tokens."""
    ids, _ = spell(model, request, context)
    target = model.tokenizer(request.target_new).input_ids
    logp = model.hf(torch.tensor([ids + target[:-1]]), use_cache=False).logits[0].float().log_softmax(-1)
    return float(sum(logp[len(ids) - 1 + n, token] for n, token in enumerate(target)).exp())
