"""Cases of `run.py`: values of 32 edits, and their insertion, against the published loops."""

from __future__ import annotations

import random
from typing import Any

import naive_editing
import torch
from shared import peak_memory, timed

import knowedit_ext as ke
from knowedit_ext.editing.request import EditRequest, lookup
from knowedit_ext.editing.tokenized import tokenize_requests
from knowedit_ext.editing.values import KL_PROMPT, Values, optimise_values
from knowedit_ext.model.facts import Fact, tokenize_fact
from knowedit_ext.world import load_world

EDITS, LAYERS = 32, (4, 5, 6, 7, 8)
CONTEXTS = [
    ["{}"],
    ["The weather was mild. {}", "They went home. {}", "I read it. {}", "So it is. {}", "You know that. {}"],
]


def requests_of_world() -> list[EditRequest]:
    return [EditRequest.of(record) for record in random.Random(0).sample(load_world().records(), EDITS)]


def texts(
    model: ke.EditableModel, request: EditRequest, contexts: list[str], with_target: bool
) -> list[naive_editing.Text]:
    spelled = []
    for t in (tokenize_fact(model, request.fact(context, with_target)) for context in contexts):
        at = lookup(t, "subject_last")
        spelled.append(naive_editing.Text(t.ids + t.target_ids[:-1], at, t.target_ids))
    return spelled


def values_case(model: ke.EditableModel, repeat: int) -> dict[str, Any]:
    """z of 32 edits at layer 8, 20 steps."""
    params = ke.MEMITParams(layers=(LAYERS[-1],), v_num_grad_steps=20)
    requests = requests_of_world()
    flat = [context for group in CONTEXTS for context in group]

    def optimise() -> Values:
        tokenized = tokenize_requests(model, requests, flat, params.fact_token)
        return optimise_values(model, tokenized, params, "layer", LAYERS[-1])

    (ours, seconds), memory = peak_memory(lambda: timed(optimise, repeat))

    def loop() -> torch.Tensor:
        values = []
        for request in requests:
            kl = tokenize_fact(model, Fact(KL_PROMPT, request.subject))
            values.append(
                naive_editing.compute_z(
                    model.hf,
                    model.modules.layers[LAYERS[-1]],
                    texts(model, request, flat, True),
                    naive_editing.Text(kl.ids, lookup(kl, "subject_last")),
                    params.v_num_grad_steps,
                    params.v_lr,
                    params.v_weight_decay,
                    params.clamp_norm_factor,
                    params.kl_factor,
                )  # fmt: skip
            )
        return torch.stack(values)

    (plain, plain_seconds), plain_memory = peak_memory(lambda: timed(loop, 1))
    error = ((ours.values - plain).norm(dim=1) / plain.norm(dim=1)).max().item()
    return check("values", error, 1e-3, seconds, plain_seconds) | {"peak_mb": memory, "plain_peak_mb": plain_memory}


def insert_case(model: ke.EditableModel, repeat: int) -> dict[str, Any]:
    """Keys, residuals and solves of 32 edits in layers 4-8, from given values."""
    torch.manual_seed(0)
    requests = requests_of_world()
    params = ke.MEMITParams(layers=LAYERS)
    width = model.modules.down_projection(0).nx
    matrices = []
    for _ in LAYERS:
        a = torch.randn(2 * width, width)
        matrices.append(a.T @ a / len(a))
    values = torch.randn(EDITS, model.hidden_size)

    def insert() -> ke.Edit:  # with fresh moments, whose factors are not cached yet
        moments = ke.Moments.from_arrays({layer: (m, 10 * width) for layer, m in zip(LAYERS, matrices, strict=True)})
        return ke.memit(model, requests, params, moments, contexts=CONTEXTS, values=values)

    (ours, seconds), memory = peak_memory(lambda: timed(insert, repeat))
    groups = [[texts(model, r, group, False) for group in CONTEXTS] for r in requests]
    layers = [model.modules.layers[layer] for layer in LAYERS]
    projections = [model.modules.down_projection(layer) for layer in LAYERS]
    arguments = (model.hf, layers, projections, groups, values, matrices, params.mom2_update_weight)
    loop = lambda: naive_editing.insert(*arguments)  # noqa: E731
    (plain, plain_seconds), plain_memory = peak_memory(lambda: timed(loop, 1))
    names = [f"{model.modules.parameter_name(layer)}.weight" for layer in LAYERS]
    error = max(((ours.delta(n) - p).norm() / p.norm()).item() for n, p in zip(names, plain, strict=True))
    return check("insert", error, 1e-3, seconds, plain_seconds) | {"peak_mb": memory, "plain_peak_mb": plain_memory}


def check(name: str, error: float, allowed: float, seconds: float, plain_seconds: float) -> dict[str, Any]:
    if not error <= allowed:
        raise SystemExit(f"{name}: differs from the plain loop by {error:.1e}: no times are reported")
    return {"error": error, "plain_seconds": plain_seconds, "seconds": seconds, "ratio": plain_seconds / seconds}
