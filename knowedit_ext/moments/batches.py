"""From texts to batches of similar length, the same ones whoever asks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

GROUP = 1000  # texts sorted by length together
ENOUGH, NEAR = 1024, 0.85  # matrices run at full speed from so many rows on


@dataclass(frozen=True)
class Batch:
    """ids: int64 [texts, longest], padded on the right; mask: bool of that shape, True at the texts' own tokens."""

    ids: torch.Tensor
    mask: torch.Tensor
    tokens: int


def limited(ids: Sequence[list[int]], left: int | None) -> list[list[int]]:
    """The first texts, the last of them cut, so that there are at most `left` tokens in all."""
    if left is None:
        return list(ids)
    kept = []
    for text in ids:
        if left <= 0:
            break
        kept.append(text[:left])
        left -= len(kept[-1])
    return kept


def make_batches(ids: Sequence[list[int]], batch_tokens: int, seed: int) -> list[Batch]:
    """Texts of similar length in batches of at most `batch_tokens` tokens, padding included; in an order of their own.

    A batch that has ENOUGH tokens takes no texts shorter than NEAR of its longest: they would be mostly padding. A text
    longer than `batch_tokens` is a batch by itself; texts without tokens are left out.
    """
    ordered = sorted((text for text in ids if text), key=len, reverse=True)
    batches, first = [], 0
    while first < len(ordered):
        longest = len(ordered[first])
        members, held = [], 0
        for text in ordered[first : first + max(1, batch_tokens // longest)]:
            if held >= ENOUGH and len(text) < NEAR * longest:
                break
            members.append(text)
            held += len(text)
        padded = torch.zeros(len(members), longest, dtype=torch.int64)
        mask = torch.zeros(padded.shape, dtype=torch.bool)
        for row, text in enumerate(members):
            padded[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = True
        batches.append(Batch(padded, mask, sum(map(len, members))))
        first += len(members)
    random.Random(seed).shuffle(batches)  # so that whoever stops halfway has not seen long texts alone
    return batches
