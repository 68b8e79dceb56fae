"""What resists a change of a layer: the metrics of the closed-form editors.

All are one formula (MEMIT's Eqn. 14 and AlphaEdit's update are its cases): with A = [earlier keys, K] [d, m + n],

    S = N A (eps I + A^T N A)^-1, its last n columns;   dW^T = S R^T

N says how cheap a direction of the input is to change: (lambda C + mu I)^-1 where known keys are to keep their values
(`Preserving`), P / L2 where the change stays in their null space (`NullSpace`), I / lambda (`Plain`).
"""

from __future__ import annotations

from typing import Protocol

import torch

from ..moments import Moments


class Metric(Protocol):
    def apply(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """N K, [d, n] float64."""
        ...

    def solve(self, layer: int, keys: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
        """S [d, n] for keys [d, n] and earlier keys [d, m] (`spread.Solve`), eps = 1."""
        ...


class Preserving:
    """N = (weight * C + mu * I)^-1. `solve` is by the kept factor and refined to float64, see `Moments.solve`.

    ridge: added to C, in its units, where it is not positive definite, see `Moments.solve`.
    """

    def __init__(self, moments: Moments, weight: float, mu: float = 0.0, ridge: float | str | None = None) -> None:
        self.moments, self.weight = moments, weight
        if mu and isinstance(ridge, str):
            raise ValueError(f"ridge is '{ridge}', but mu = {mu:g} makes the moments positive definite by itself")
        self.ridge = ridge if not mu else (ridge or 0.0) + mu / weight

    def apply(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        lower = self.moments.factors.get(self.moments[layer], self.weight, self.ridge, False, keys.device).lower
        return torch.cholesky_solve(keys.double(), lower)

    def solve(self, layer: int, keys: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
        together = torch.cat([earlier, keys], 1)
        return self.moments.solve(layer, together, self.weight, self.ridge).matrix[:, earlier.shape[1] :]


class NullSpace:
    """N = P / l2, P the projection onto the eigenvectors of C with eigenvalues below `threshold` (AlphaEdit).

    threshold, share: see `Moments.null_space`.
    """

    def __init__(self, moments: Moments, l2: float, threshold: float | None, share: float | None = None) -> None:
        self.moments, self.l2 = moments, l2
        self.limit = {"threshold": threshold, "share": share}

    def rank(self, layer: int) -> int:
        return self.moments.null_space(layer, **self.limit).rank

    def apply(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        return self.moments.null_space(layer, **self.limit).project(keys.double()) / self.l2

    def solve(self, layer: int, keys: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
        return solve_in_keys(self, layer, keys, earlier)


class Plain:
    """N = I / weight: no direction is cheaper than another."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def apply(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        return keys.double() / self.weight

    def solve(self, layer: int, keys: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
        return solve_in_keys(self, layer, keys, earlier)


ALIKE = 1e-6  # of a key, the least share (squared, as the metric measures) that the keys before it do not have


def solve_in_keys(
    metric: Metric, layer: int, keys: torch.Tensor, earlier: torch.Tensor, epsilon: float = 1.0
) -> torch.Tensor:
    """S by one Cholesky of (m + n) x (m + n): 2 d (m + n)^2 + (m + n)^3 / 3 flops, never a d x d system.

    epsilon: 0 asks that the keys come out exactly as wanted. ValueError where the keys do not allow that.
    """
    together = torch.cat([earlier, keys], 1).double()  # A
    cheap = metric.apply(layer, together)  # N A
    small = together.T @ cheap
    small = (small + small.T) / 2
    small.diagonal().add_(epsilon)
    lower, info = torch.linalg.cholesky_ex(small)
    alike = not epsilon and bool((lower.diagonal().square() < ALIKE * small.diagonal()).any())
    if int(info) or alike:
        raise ValueError(
            f"layer {layer}: {together.shape[1]} keys, earlier ones among them, cannot be told apart: two requests "
            "have the same one, or the metric leaves no direction for them. Leave out the earlier edit that is redone"
        )
    last = torch.eye(len(small), dtype=small.dtype, device=small.device)[:, earlier.shape[1] :]
    return cheap @ torch.cholesky_solve(last, lower)
