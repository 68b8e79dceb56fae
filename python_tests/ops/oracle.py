"""What the ops mean, written as float64 loops straight from their contracts; shares no code with the package."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def visible(segments: list[list[int]], line: int, position: int, window: int) -> tuple[list[int], list[int]]:
    """Key rows that the row at `position` of segment `line` sees, walking up from its own segment; their positions."""
    _, kv_row, start, _, parent = segments[line]
    positions = [j for j in range(start, position + 1) if not window or position - window < j]
    rows = [kv_row + j - start for j in positions]
    limit = start
    while parent != -1:
        _, kv_row, start, length, above = segments[parent]
        for j in range(start, min(start + length, limit)):
            if not window or position - window < j:
                rows.append(kv_row + j - start)
                positions.append(j)
        limit = min(limit, start)
        parent = above
    return rows, positions


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """[rows, heads, d] in float64."""
    table = segments.tolist()
    q, k, v = (x.detach().double().cpu().numpy() for x in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for line, (query_row, _, start, length, _) in enumerate(table):
        for i in range(length if query_row >= 0 else 0):
            seen, positions = visible(table, line, start + i, window)
            for head in range(q.shape[1]):
                scores = [scale * float(k[r, head // group] @ q[query_row + i, head]) for r in seen]
                if softcap:
                    scores = [softcap * math.tanh(s / softcap) for s in scores]
                if bias is not None:
                    scores = [s + float(bias[head, at]) for s, at in zip(scores, positions, strict=True)]
                every = np.array(scores if sinks is None else [*scores, float(sinks[head])])
                weights = np.exp(every - every.max())
                out[query_row + i, head] = (weights / weights.sum())[: len(seen)] @ v[seen, head // group]
    return torch.from_numpy(out)


def target_logprob(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float) -> Tensor:
    """Like targets, in float64."""
    logits = hidden.detach().double().cpu() @ weight.detach().double().cpu().T
    logits = logits if bias is None else logits + bias.detach().double().cpu()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    out = [
        [float(row[t] - torch.logsumexp(row, 0)) for t in line]
        for row, line in zip(logits, targets.reshape(len(targets), -1).tolist(), strict=True)
    ]
    return torch.tensor(out, dtype=torch.float64).reshape(targets.shape)
