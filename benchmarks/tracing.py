"""Causal tracing against the published loop (`run.py trace`)."""

from __future__ import annotations

import sys
from typing import Any

import naive
import numpy as np
from shared import small_gpt2, timed, world_model

import knowedit_ext as ke
from knowedit_ext.model.facts import tokenize_fact
from knowedit_ext.sweep import sweep
from knowedit_ext.tracing.causal import plan_facts
from knowedit_ext.tracing.cells import all_cells
from knowedit_ext.tracing.kinds import window_for, window_layers
from knowedit_ext.tracing.settings import TraceSettings


def compare_trace(model: ke.EditableModel, fact: ke.Fact, kind: str, repeat: int, check_only: bool) -> dict[str, Any]:
    tokenized, noise, layers = tokenize_fact(model, fact), 0.1, range(model.num_layers)
    window = window_for(model.num_layers, None, (kind,))
    if kind == "state":
        row = [[model.modules.layers[layer]] for layer in layers]
    else:
        row = [
            [model.modules.site(kind, w) for w in window_layers(layer, window, model.num_layers)] for layer in layers
        ]
    ids = list(tokenized.ids)
    arguments = (model.hf, model.modules.embedding, [row] * len(ids), ids, tokenized.subject_range, noise)
    plain, plain_time = timed(lambda: naive.causal_trace(*arguments), 1 if check_only else repeat)
    ours, our_time = timed(lambda: ke.trace(model, fact, kind, noise=noise), 1 if check_only else 2 * repeat + 1)
    error = max(np.abs(ours.scores - plain[0]).max(), abs(ours.low_score - plain[1]), abs(ours.high_score - plain[2]))
    if error > 1e-5:
        raise SystemExit(f"{kind}: differs from the plain loop by {error:.1e}: no times are reported")
    (plan,) = plan_facts(model, [fact], (kind,), noise, TraceSettings())
    swept = sweep(model, [plan.clean], all_cells((plan.shape,), (kind,))[0], plan.hidden)
    weights = sum(p.numel() for p in model.modules.layers[0].parameters() if p.dim() > 1)
    head = model.modules.head.weight.numel()
    flops = swept.flops + 2 * len(swept.states) * head
    # The loop: 1 + 10 rows a cell through all layers, and the head at every position.
    plain_flops = 2 * (len(ids) * len(layers) + 1) * 11 * len(ids) * (weights * len(layers) + head)
    return {
        "tokens": len(ids),
        "subject_range": list(tokenized.subject_range),
        "layers": len(layers),
        "error": float(error),
        "plain_seconds": plain_time,
        "seconds": our_time,
        "ratio": plain_time / our_time,
        "gflop": flops / 1e9,
        "plain_gflop": plain_flops / 1e9,
        "arithmetic_ratio": plain_flops / flops,
        "gflops": flops / 1e9 / our_time,
        "plain_gflops": plain_flops / 1e9 / plain_time,
    }


def trace_case(repeat: int, check_only: bool) -> dict[str, Any]:
    cases = {}
    for name, build in (("gpt2_small", small_gpt2), ("world", world_model)):
        model, fact = build()
        for kind in ("state",) if name == "gpt2_small" else ("state", "mlp", "attn"):
            cases[f"{name}_{kind}"] = compare_trace(model, fact, kind, repeat, check_only)
            print(f"{name} {kind}: checked, error {cases[f'{name}_{kind}']['error']:.1e}", file=sys.stderr)
    return cases
