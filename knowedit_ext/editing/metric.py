"""What resists a change of a layer: the metrics of the closed-form editors.

All are one formula (MEMIT's Eqn. 14 and AlphaEdit's update are its cases): with A = [earlier keys, K] [d, m + n],

    S = N A (eps I + A^T N A)^-1, its last n columns;   dW^T = S R^T

N says how cheap a direction of the input is to change: (lambda C + mu I)^-1 where known keys are to keep their values
(`Preserving`), P / L2 where the change stays in their null space (`NullSpace`), I / lambda (`Plain`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Protocol

import torch

from ..model.load import EditableModel
from ..moments import Moments
from ..moments.null_space import NullSpace as Directions
from ..moments.solver import Factor
from ..ops.cholesky import System, factor_sum, least_size, refined, triangles
from .deflation import ALIKE, AlikeError, Apply, deflated

TOLERANCE = 1e-14  # backward error of a solution


class Metric(Protocol):
    """moments: which it is of, None: of none. name: what else it depends on."""

    moments: Moments | None
    name: Hashable

    def prepare(self, layer: int, device: torch.device) -> None:
        """Do what is done once a layer: a factor, eigenvectors. ValueError where the moments do not allow it."""
        ...

    def apply(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """N K, [d, n] float64."""
        ...

    def folded(self, layer: int, earlier: torch.Tensor) -> Apply:
        """(N^-1 + H H^T)^-1 for earlier keys H [d, m] float64, on the range of N."""
        ...

    def solve(self, layer: int, keys: torch.Tensor, earlier: Sequence[torch.Tensor]) -> torch.Tensor:
        """S [d, n] for keys [d, n] and earlier keys, [d, m] of each edit (`spread.Solve`), eps = 1."""
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
        self.name = ("preserving", float(weight), self.ridge)

    def prepare(self, layer: int, device: torch.device) -> None:
        self._factor(layer, device)

    def _factor(self, layer: int, device: torch.device) -> Factor:
        return self.moments.factors.get(self.moments[layer], self.weight, self.ridge, False, device)

    def apply(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        return triangles(self._factor(layer, keys.device).lower, keys.double())

    def alone(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """N K, refined to float64: up to its length each column is what `solve` gives for that key by itself."""
        factor = self._factor(layer, keys.device)
        system = System(factor.mean, self.weight, factor.ridge, (), self.weight * (factor.norm + factor.ridge))
        keys = keys.double()
        if not bool(keys.isfinite().all()):
            raise ValueError(f"keys of layer {layer} are not finite")
        return refined(keys, lambda r: triangles(factor.lower, r), system.judge(keys))[0]

    def folded(self, layer: int, earlier: torch.Tensor) -> Apply:
        factor = self._factor(layer, earlier.device)
        lower, _ = factor_sum(factor.mean, self.weight, factor.ridge, [earlier])
        return lambda keys: triangles(lower, keys.double())

    def solve(self, layer: int, keys: torch.Tensor, earlier: Sequence[torch.Tensor]) -> torch.Tensor:
        """Behind earlier keys from what is kept of them; where that does not come to float64 from the factored sum."""
        if not earlier:
            return self.moments.solve(layer, keys, self.weight, self.ridge).matrix
        keys, factor = keys.double(), self._factor(layer, keys.device)
        blocks = [*(block.to(keys.device, torch.float64) for block in earlier), keys]
        size = least_size(self.weight * (factor.norm + factor.ridge), keys)
        system = System(factor.mean, self.weight, factor.ridge, blocks, size)
        with suppress(AlikeError):
            s, error, _ = refined(keys, deflated(self, layer, keys, earlier).inverse(keys), system.judge(keys))
            if error <= TOLERANCE:
                return s
        return self.moments.solve(layer, torch.cat(blocks, 1), self.weight, self.ridge).matrix[:, -keys.shape[1] :]


class NullSpace:
    """N = P / l2, P the projection onto the eigenvectors of C with eigenvalues below `threshold` (AlphaEdit).

    threshold, share: see `Moments.null_space`.
    """

    def __init__(self, moments: Moments, l2: float, threshold: float | None, share: float | None = None) -> None:
        self.moments, self.l2 = moments, l2
        self.limit = {"threshold": threshold, "share": share}
        self.name = ("null space", l2, threshold, share)

    def prepare(self, layer: int, device: torch.device) -> None:
        self._space(layer, device)

    def _space(self, layer: int, device: torch.device) -> Directions:
        return self.moments.null_space(layer, **self.limit, device=device)

    def apply(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        return self._project(layer, keys) / self.l2

    def _project(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        return self._space(layer, keys.device).project(keys.double())

    def folded(self, layer: int, earlier: torch.Tensor) -> Apply:
        """P (P H H^T P + l2 I)^-1 P; the inverse leaves the null space to itself."""
        inside = self._project(layer, earlier)
        lower, _ = factor_sum(torch.eye(len(inside), dtype=inside.dtype, device=inside.device), self.l2, 0.0, [inside])
        return lambda keys: triangles(lower, self._project(layer, keys))

    def solve(self, layer: int, keys: torch.Tensor, earlier: Sequence[torch.Tensor]) -> torch.Tensor:
        return solve_in_keys(self, layer, keys, earlier)


class Plain:
    """N = I / weight: no direction is cheaper than another."""

    moments = None

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.name = ("plain", weight)

    def prepare(self, layer: int, device: torch.device) -> None:
        pass

    def apply(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        return keys.double() / self.weight

    def folded(self, layer: int, earlier: torch.Tensor) -> Apply:
        eye = torch.eye(len(earlier), dtype=earlier.dtype, device=earlier.device)
        lower, _ = factor_sum(eye, self.weight, 0.0, [earlier])
        return lambda keys: triangles(lower, keys.double())

    def solve(self, layer: int, keys: torch.Tensor, earlier: Sequence[torch.Tensor]) -> torch.Tensor:
        return solve_in_keys(self, layer, keys, earlier)


def prepare(model: EditableModel, metric: Metric, layers: Sequence[int]) -> None:
    """See `Metric.prepare`: before values are optimised, which takes long."""
    for layer in layers:
        module = model.modules.down_projection(layer)
        stored = next(chain(module.parameters(), module.buffers()), None)  # quantised ones may have no `weight`
        metric.prepare(layer, model.device if stored is None else stored.device)


def solve_in_keys(
    metric: Metric, layer: int, keys: torch.Tensor, earlier: Sequence[torch.Tensor], epsilon: float = 1.0
) -> torch.Tensor:
    """S by Cholesky of n x n behind what is kept of the earlier keys, see `deflation`; never a d x d system a batch.

    epsilon: 0 asks that the keys come out exactly as wanted. ValueError where the keys do not allow that.
    """
    return deflated(metric, layer, keys, earlier, epsilon).solve(keys.double())


def unmoved(
    metric: Metric,
    layer: int,
    keys: torch.Tensor,
    u: torch.Tensor,
    apart: torch.Tensor,
    earlier: Sequence[torch.Tensor],
) -> torch.Tensor:
    """u [d, n], in N' of keys [d, n] behind earlier ones, less what each has of its column of apart [d, n]: u^T apart
    is 0, at the least cost. Where a column of apart is zero or along its key, or earlier keys hold it fast, u stays.

    AlikeError where what earlier keys leave of a key is along apart: it cannot both stay and change.
    """
    apart, cheap = apart.double(), metric.apply(layer, apart)
    left = deflated(metric, layer, apart, earlier, epsilon=0.0).apply(apart) if earlier else cheap
    size = (apart * left).sum(0)
    share = torch.where(size > ALIKE * (apart * cheap).sum(0), (apart * u).sum(0) / size, 0.0)
    less = u - left * share
    gone = (keys * less).sum(0) < ALIKE * (keys * u).sum(0)
    if earlier and bool(gone.any()):
        raise AlikeError(layer, sum(block.shape[1] for block in earlier) + 2)
    return torch.where(gone, u, less)
