"""When is there enough text? When the solutions that edits need have stopped moving.

A few keys k of each layer are kept from the beginning of the text, and C^-1 k is solved now and then, each time after
1.5 times as many keys as the last time. In the linear regime the error of the solution s_N from N keys has variance
v / N; s_N contains the m keys of the last solution s_m, so that s_m - s_N has variance v (1/m - 1/N), and

    error of s_N  ~  |s_m - s_N| * sqrt(m / (N - m)).

Sizes are those of the effect on a typical key: |s|^2 = s^T C s, relative, over all probes together. C gets a ridge of
1e-7 times its mean diagonal: directions weaker than that are the noise of float32 sums.
"""

from __future__ import annotations

import logging
import math

import torch

from .. import ops

logger = logging.getLogger(__name__)

PROBES = 32
GROWTH = 1.5
_RIDGE = 1e-7


class Settling:
    """Follows the solutions of probe keys; its state goes into checkpoints with the sums."""

    def __init__(self, tolerance: float, widths: dict[int, int]) -> None:
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance is {tolerance}: expected a relative error between 0 and 1")
        self.tolerance = tolerance
        self.probes = {layer: torch.zeros(width, PROBES, dtype=torch.float64) for layer, width in widths.items()}
        self.solved = {layer: torch.zeros_like(probe) for layer, probe in self.probes.items()}
        self.count = 0  # keys behind `solved`
        self.due = max(widths.values())  # fewer keys than the width say nothing
        self.checks = 0
        self.missing: dict[int, float] = {}

    def take_probes(self, layer: int, keys: torch.Tensor) -> None:
        """Keep some of keys [n, d_in], spread evenly."""
        chosen = torch.linspace(0, len(keys) - 1, min(PROBES, len(keys))).round().long()
        self.probes[layer][:, : len(chosen)] = keys[chosen.to(keys.device)].T.to("cpu", torch.float64)

    def settled(self, means: dict[int, torch.Tensor], count: int) -> bool:
        """Look at the means (lower triangles) over `count` keys; is every layer's estimate below the tolerance?"""
        for layer, mean in means.items():
            self.missing.pop(layer, None)
            ridge = _RIDGE * float(mean.diagonal().mean())
            lower, info = ops.cholesky_factor(mean, 1.0, ridge)
            if int(info):
                self.solved[layer] = torch.zeros_like(self.probes[layer])
                continue
            half = torch.linalg.solve_triangular(lower, self.probes[layer], upper=False)
            now = torch.linalg.solve_triangular(lower.T, half, upper=True)
            before = self.solved[layer]
            if self.count and before.any():
                moved = float((lower.T @ (now - before)).norm() / (lower.T @ now).norm().clamp(min=1e-300))
                self.missing[layer] = moved * math.sqrt(self.count / (count - self.count))
            self.solved[layer] = now
        self.count, self.due, self.checks = count, math.ceil(GROWTH * count), self.checks + 1
        estimates = ", ".join(f"layer {layer}: {value:.2g}" for layer, value in self.missing.items())
        logger.info("after %d keys: estimated error %s", count, estimates or "not known yet")
        return len(self.missing) == len(means) and max(self.missing.values()) <= self.tolerance

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"probe.{layer}": t for layer, t in self.probes.items()} | {
            f"solved.{layer}": t for layer, t in self.solved.items()
        }

    def numbers(self) -> dict[str, object]:
        return {"count": self.count, "due": self.due, "checks": self.checks, "missing": self.missing}

    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict) -> None:
        for layer in self.probes:
            self.probes[layer], self.solved[layer] = tensors[f"probe.{layer}"], tensors[f"solved.{layer}"]
        self.count, self.due, self.checks = numbers["count"], numbers["due"], numbers["checks"]
        self.missing = {int(layer): value for layer, value in numbers["missing"].items()}
