"""AlphaEdit's update against the published d x d system (`run.py alphaedit`)."""

from __future__ import annotations

from typing import Any

import torch
from editing import check
from shared import timed

import knowedit_ext as ke
from knowedit_ext.editing.metric import NullSpace

WIDTH, BATCH, EARLIER, OUTPUT, SHARE, L2 = 3072, 100, 1000, 768, 0.02, 10.0


def moment(width: int, seed: int = 0) -> torch.Tensor:
    """E[k k^T], float64, with a spectrum over four decades, as keys' have."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(2 * width, width, generator=draw, dtype=torch.float64) * torch.logspace(-2, 0, width)
    return keys.T @ keys / len(keys)


def alphaedit_case(model: ke.EditableModel | None, repeat: int) -> dict[str, Any]:
    """dW of 100 requests behind 1,000 earlier ones, the projection known; float64 on both sides."""
    draw = torch.Generator().manual_seed(1)
    moments = ke.Moments.from_arrays({0: (moment(WIDTH), 2 * WIDTH)})
    metric = NullSpace(moments, L2, None, SHARE)
    rank = metric.rank(0)  # decomposed once, before the times
    random = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    earlier, keys, residual = random(WIDTH, EARLIER), random(WIDTH, BATCH), random(OUTPUT, BATCH)
    ours, seconds = timed(lambda: metric.solve(0, keys, earlier) @ residual.T, repeat)
    projection = moments.null_space(0, share=SHARE).project(torch.eye(WIDTH, dtype=torch.float64))
    cache = earlier @ earlier.T

    def published() -> torch.Tensor:  # AlphaEdit_main.py:128-131
        left = projection @ (keys @ keys.T + cache) + L2 * torch.eye(WIDTH, dtype=torch.float64)
        return torch.linalg.solve(left, projection @ keys @ residual.T)

    plain, plain_seconds = timed(published, 1)
    error = float((ours - plain).norm() / plain.norm())
    return check("alphaedit", error, 1e-9, seconds, plain_seconds) | {"d": WIDTH, "rank": rank}
