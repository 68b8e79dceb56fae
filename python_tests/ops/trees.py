"""Segment tables to test with, and the yardstick for errors."""

from __future__ import annotations

import random

import torch
from ops import oracle
from torch import Tensor


def table(*lines: tuple[int, int, int, int, int]) -> Tensor:
    """Lines (query_row, kv_row, position, length, parent) as an int32 [n, 5] tensor."""
    return torch.tensor(lines, dtype=torch.int32).view(-1, 5)


def forest(lengths: list[int]) -> tuple[Tensor, int]:
    """A root and a chain of children below it, of these lengths, each leaving its parent's last row out."""
    lines, row, position = [], 0, 0
    for i, length in enumerate(lengths):
        lines.append((row, row, position, length, i - 1))
        row, position = row + length, position + max(length - 1, 1)
    return table(*lines), row


def random_tree(seed: int, most: int = 8, longest: int = 6) -> tuple[Tensor, int, int]:
    """Any table the contract allows, its rows and its key rows: gaps, views, frozen and empty segments, any order."""
    rng = random.Random(seed)
    lines, row, kv_rows = [], 0, 0
    for i in range(rng.randint(1, most)):
        length = rng.randint(0, longest)
        views = kv_rows > length and rng.random() < 0.2
        kv_row = rng.randint(0, kv_rows - length) if views else kv_rows
        kv_rows += 0 if views else length
        query_row = -1 if rng.random() < 0.2 else row
        row += length if query_row >= 0 else 0
        lines.append([query_row, kv_row, rng.randint(0, 9), length, rng.randint(-1, i - 1)])
    order = rng.sample(range(len(lines)), len(lines))
    lines = [[*lines[i][:4], order.index(lines[i][4]) if lines[i][4] >= 0 else -1] for i in order]
    return table(*lines), row + rng.randint(0, 2), kv_rows + rng.randint(0, 2)


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The op as anyone would write it in torch, row by row and in the tensors' own dtype."""
    lines, out, group = segments.tolist(), torch.zeros_like(q), q.shape[1] // k.shape[1]
    for line, (query_row, _, start, length, _) in enumerate(lines):
        for i in range(length if query_row >= 0 else 0):
            seen, positions = oracle.visible(lines, line, start + i, window)
            keys, values = (x[seen].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
            scores = keys @ q[query_row + i, :, :, None] * scale  # [heads, seen, 1]
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if bias is not None:
                scores = scores + bias.to(scores)[:, positions, None]
            if sinks is not None:
                scores = torch.cat([scores, sinks.to(scores)[:, None, None]], 1)
            weights = torch.softmax(scores, 1)[:, : len(seen)]
            out[query_row + i] = (weights.transpose(1, 2) @ values)[:, 0]
    return out


def error(value: Tensor, truth: Tensor) -> float:
    """Size of the deviation relative to that of the truth."""
    return float((value.detach().double().cpu() - truth).norm() / truth.norm().clamp(min=1e-30))


def assert_as_good_as(value: Tensor, plain: Tensor, truth: Tensor) -> None:
    """At most twice the error of the plain torch expression in the same dtype; one rounding is always allowed."""
    allowed = max(2 * error(plain, truth), torch.finfo(value.dtype).eps)
    assert error(value, truth) <= allowed
