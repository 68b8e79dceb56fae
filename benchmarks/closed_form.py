"""Cases of `run.py`: AlphaEdit's update against the published d x d system, and what a history of edits costs."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from editing import CONTEXTS, LAYERS, check
from shared import timed

import knowedit_ext as ke
from knowedit_ext.editing.methods.memit import memit_values
from knowedit_ext.editing.metric import NullSpace
from knowedit_ext.world import load_world

WIDTH, BATCH, EARLIER, OUTPUT, SHARE, L2 = 3072, 100, 1000, 768, 0.02, 10.0
HISTORY = 2000


def random(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def keys_of(draw: torch.Generator, width: int, count: int) -> torch.Tensor:
    """[width, count] in float32, lying in memory as an edit's keys do."""
    return random(draw, count, width).float().T


def moment(width: int, seed: int = 0) -> torch.Tensor:
    """E[k k^T], float64, with a spectrum over four decades, as keys' have."""
    draw = torch.Generator().manual_seed(seed)
    keys = random(draw, 2 * width, width) * torch.logspace(-2, 0, width)
    return keys.T @ keys / len(keys)


def alphaedit_case(model: ke.EditableModel | None, repeat: int) -> dict[str, Any]:
    """dW of 100 requests behind 1,000 earlier ones in 10 batches, the projection known; float64 on both sides.

    Timed is what `ke.alphaedit` calls for the 11th batch of a sequence, the first 10 having gone the same way; beside
    it the same call where nothing is kept.
    """
    draw = torch.Generator().manual_seed(1)
    moments = ke.Moments.from_arrays({0: (moment(WIDTH), 2 * WIDTH)})
    metric = NullSpace(moments, L2, None, SHARE)
    rank, decomposed = timed(lambda: moments.null_space(0, share=SHARE).rank, 1)
    earlier = [keys_of(draw, WIDTH, BATCH) for _ in range(EARLIER // BATCH)]
    keys, residual = keys_of(draw, WIDTH, BATCH), random(draw, OUTPUT, BATCH)

    def update(behind: list[torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        return metric.solve(0, batch.double(), behind) @ residual.T

    _, first = timed(lambda: (moments.deflations.clear(), update(earlier, keys)), repeat)
    times = []
    for _ in range(repeat):
        moments.deflations.clear()
        for number in range(1, len(earlier)):  # the batches before, each behind those before it
            update(earlier[:number], earlier[number])
        start = time.perf_counter()
        ours = update(earlier, keys)
        times.append(time.perf_counter() - start)

    projection = moments.null_space(0, share=SHARE).project(torch.eye(WIDTH, dtype=torch.float64))
    cache = sum(block.double() @ block.double().T for block in earlier)

    def published() -> torch.Tensor:  # AlphaEdit_main.py:128-131
        k = keys.double()
        left = projection @ (k @ k.T + cache) + L2 * torch.eye(WIDTH, dtype=torch.float64)
        return torch.linalg.solve(left, projection @ k @ residual.T)

    plain, plain_seconds = timed(published, repeat)
    error = float((ours - plain).norm() / plain.norm())
    note = (
        f"alphaedit: d {WIDTH}, null space of {rank}, {BATCH} requests behind {EARLIER}; {first:.3f} s where nothing "
        f"of the history is kept; the eigenvectors, once a model, {decomposed:.1f} s"
    )
    return check("alphaedit", error, 1e-9, median(times), plain_seconds) | {
        "d": WIDTH,
        "rank": rank,
        "first_seconds": first,
        "decomposed_seconds": decomposed,
        "note": note,
    }


def history_case(model: ke.EditableModel, repeat: int) -> dict[str, Any]:
    """What 2,000 earlier edits (20 batches) add to a whole batch of 100, by `ke.memit` and `ke.alphaedit`.

    A batch is its values, the same with history and without, and its insertion, which is timed both ways.
    """
    draw = torch.Generator().manual_seed(2)
    requests = [ke.EditRequest.of(record) for record in load_world().records()[:BATCH]]
    width = model.modules.down_projection(0).nx
    matrices = {layer: (moment(width, layer), 2 * width) for layer in LAYERS}
    memit, alpha = ke.MEMITParams(layers=LAYERS), ke.AlphaEditParams(layers=LAYERS, nullspace_share=SHARE)
    values, seconds = timed(lambda: memit_values(model, requests, memit, contexts=CONTEXTS), 1)
    measured: dict[str, Any] = {"values_seconds": seconds}
    notes = []
    for name, insert, params in (("memit", ke.memit, memit), ("alphaedit", ke.alphaedit, alpha)):
        moments = ke.Moments.from_arrays(matrices)

        def batch(earlier: list[ke.Edit], insert=insert, params=params, moments=moments) -> ke.Edit:
            return insert(model, requests, params, moments, contexts=CONTEXTS, values=values, earlier=earlier)

        batch([])  # factors and eigenvectors, once a model
        history = [made_earlier(draw, moments) for _ in range(HISTORY // BATCH)]
        first, added, alone = 0.0, [], []
        for number in range(repeat + 1):  # a sequence: each batch behind those before it
            _, without = timed(lambda batch=batch: batch([]), 1)
            made, behind = timed(lambda batch=batch, history=history: batch(history), 1)
            history = [*history, made]
            alone.append(without)
            if number:
                added.append(behind - without)
            else:
                first = behind - without
        insertion, more = median(alone), median(added)
        share = more / (seconds + insertion)
        measured[name] = {
            "insertion_seconds": insertion,
            "history_seconds": more,
            "first_seconds": first,
            "share": share,
        }
        notes.append(
            f"{name}: a batch of {BATCH} takes {seconds:.1f} s for its values, {insertion:.2f} s for its insertion; "
            f"{HISTORY} earlier edits add {more:.2f} s ({100 * share:.1f} %), {first:.2f} s where nothing is kept"
        )
    return measured | {"note": "; ".join(notes)}


def made_earlier(draw: torch.Generator, moments: ke.Moments) -> ke.Edit:
    """An edit that is nothing but keys."""
    edit = ke.Edit({}, "memit")
    edit.keys = {layer: keys_of(draw, moments[layer].width, BATCH) for layer in moments.layers}
    return edit
