"""Cases of `run.py`: moments of five layers in one pass, the solve with its factor kept; against the published loops.

    python benchmarks/run.py moments solve [--check] [--repeat 3]

Peak memory is what a call holds beyond what was held before it (Linux; nan elsewhere).
"""

from __future__ import annotations

import random
from typing import Any

import naive_moments
import torch
from shared import peak_memory, timed

import knowedit_ext as ke
from knowedit_ext.model.tokens import encode_all
from knowedit_ext.world import load_world

LAYERS = (7, 8, 9, 10, 11)
WIDTH, EDITS, WEIGHT = 3072, 100, 15000.0


def long_texts(tokens: int) -> list[str]:
    """About so many tokens of the world's statements, in texts of very different lengths."""
    draw, facts = random.Random(0), load_world().facts()
    texts: list[str] = []
    while sum(map(len, texts)) < 4 * tokens:
        texts.append(". ".join(draw.choice(facts)["prompt"] for _ in range(draw.randint(1, 40))))
    return texts


def moments_case(model: ke.EditableModel, repeat: int, tokens: int = 4000) -> dict[str, Any]:
    """Layers 7-11: one pass for all against a pass each that stops at its layer."""
    texts = long_texts(tokens)
    ids = encode_all(model, texts, model.modules.max_positions)

    def loop() -> dict[int, tuple[torch.Tensor, int]]:
        positions = model.modules.max_positions
        return {
            layer: naive_moments.layer_moment(model.hf, model.modules.down_projection(layer), ids, positions)
            for layer in LAYERS
        }

    def ours() -> ke.Moments:
        return ke.collect_moments(model, texts, LAYERS, progress=False)

    (moments, seconds), memory = peak_memory(lambda: timed(ours, repeat))
    (plain, plain_seconds), plain_memory = peak_memory(lambda: timed(loop, repeat))
    for layer in LAYERS:
        if moments[layer].count != plain[layer][1]:
            raise SystemExit(f"moments: {moments[layer].count} keys, the plain loop has {plain[layer][1]}")
    error = max(float((moments[n].matrix() - plain[n][0]).abs().max() / plain[n][0].abs().max()) for n in LAYERS)
    if error > 1e-5:
        raise SystemExit(f"moments: differ from the plain loop by {error:.1e}: no times are reported")
    flops, plain_flops = _flops(model)
    count = moments[LAYERS[0]].count
    return {
        "keys": count,
        "error": error,
        "plain_seconds": plain_seconds,
        "seconds": seconds,
        "ratio": plain_seconds / seconds,
        "arithmetic_ratio": plain_flops / flops,
        "gflops": flops * count / 1e9 / seconds,
        "peak_mb": memory,
        "plain_peak_mb": plain_memory,
    }


def _flops(model: ke.EditableModel) -> tuple[int, int]:
    """Multiplications and additions a token, without attention scores: one pass, and a pass a layer."""
    width = model.modules.down_projection(0).weight.numel()
    layer = sum(p.numel() for p in model.modules.layers[0].parameters() if p.dim() > 1)
    keys = model.hidden_size * 4
    passes = [2 * (n * layer + layer - width) for n in LAYERS]
    return max(passes) + len(LAYERS) * keys**2, sum(passes) + len(LAYERS) * 2 * keys**2


def solve_case(model: ke.EditableModel | None, repeat: int, d: int = WIDTH, n: int = EDITS) -> dict[str, Any]:
    """(weight * C + K K^T)^-1 K, C's factor kept from an earlier edit, against a dense LU in float64."""
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(3 * d + n, d, generator=draw) * torch.logspace(-2, 0, d)
    k = keys[-n:].T.double().contiguous()  # of the same kind as those that the moment is over, as edits' keys are
    keys = keys[:-n]
    moments = ke.Moments.from_arrays({0: ((keys.T @ keys / len(keys)).double(), len(keys))})
    del keys
    (first, first_seconds), first_memory = peak_memory(lambda: timed(lambda: moments.solve(0, k, WEIGHT), 1))
    (solution, seconds), memory = peak_memory(lambda: timed(lambda: moments.solve(0, k, WEIGHT), repeat))
    plain_call = lambda: naive_moments.solve(moments[0].mean, k, WEIGHT)  # noqa: E731
    (plain, plain_seconds), plain_memory = peak_memory(lambda: timed(plain_call, repeat))
    error = float((solution.matrix - plain).norm() / plain.norm())
    if solution.backward_error > 1e-14 or error > 1e-6:
        raise SystemExit(
            f"solve: backward error {solution.backward_error:.1e}, differs from LU by {error:.1e}: no times"
        )
    return {
        "d": d,
        "n": n,
        "error": solution.backward_error,
        "steps": solution.steps,
        "plain_seconds": plain_seconds,
        "seconds": seconds,
        "first_seconds": first_seconds,
        "ratio": plain_seconds / seconds,
        "peak_mb": memory,
        "first_peak_mb": first_memory,
        "plain_peak_mb": plain_memory,
    }
