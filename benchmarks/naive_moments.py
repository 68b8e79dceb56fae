"""The published loops for second moments and the solve, written plainly: what speed is quoted against.

`layer_moment`: rome's layer_stats.py, one pass over the text for one layer, texts of similar length padded together and
run up to that layer's down projection, whose unpadded inputs go into mom2 += a^T a in float32.
`solve`: memit_main.py, a dense float64 solve by LU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

GROUP = 100  # texts sorted together


class _Stop(Exception):
    pass


@torch.no_grad()
def layer_moment(
    hf: nn.Module, module: nn.Module, ids: Sequence[list[int]], positions: int
) -> tuple[torch.Tensor, int]:
    """Mean [d_in, d_in], float32, of the keys that `module` reads, and how many they are."""
    taken: list[torch.Tensor] = []

    def stop(_: nn.Module, args: tuple) -> None:
        taken.append(args[0])
        raise _Stop

    hook = module.register_forward_pre_hook(stop)
    total, count = None, 0
    for first in range(0, len(ids), GROUP):
        for batch in _collate(sorted(ids[first : first + GROUP], key=len, reverse=True), 3 * positions):
            longest = len(batch[0])
            padded = torch.tensor([text + [0] * (longest - len(text)) for text in batch]).to(hf.device)
            mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in batch]).to(hf.device)
            try:
                hf(padded, attention_mask=mask)
            except _Stop:
                pass
            a = taken.pop()[mask.bool()]  # [keys, d_in]
            total = a.new_zeros(a.shape[1], a.shape[1]) if total is None else total
            total += a.T.mm(a)
            count += len(a)
    hook.remove()
    return total / count, count


def _collate(ordered: list[list[int]], most: int) -> list[list[list[int]]]:
    """Batches of at most `most` tokens, padding included."""
    batches: list[list[list[int]]] = [[]]
    for text in ordered:
        if batches[-1] and len(batches[-1][0]) * (len(batches[-1]) + 1) > most:
            batches.append([])
        batches[-1].append(text)
    return batches


def solve(moment: torch.Tensor, keys: torch.Tensor, weight: float) -> torch.Tensor:
    """(weight * C + K K^T)^-1 K, float64."""
    return torch.linalg.solve(weight * moment.double() + keys @ keys.T, keys)
