"""A metric less what earlier keys hold fast, kept from one edit to the next.

With the keys of earlier edits H [d, m] and the metric N, elimination of the block of H in epsilon I + A^T N A,
A = [H, K], leaves for the new keys K [d, n]

    S = N' K (epsilon I + K^T N' K)^-1,   N' = N - N H (epsilon I + H^T N H)^-1 H^T N = N - Z Z^T.

Z [d, m] depends on the history alone, and each of its columns on the keys up to its own: it is cut where a history has
another end, and grows by N' K L^-T, L L^T = epsilon I + K^T N' K, which the solve of K has computed already. So a batch
costs N K and 4 d m n flops, whatever came before.

Beyond d / 2 columns the history is folded into N (where epsilon is 1): N <- (N^-1 + H H^T)^-1, and Z begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..moments.store import Moment

if TYPE_CHECKING:
    from .metric import Metric

ALIKE = 1e-6  # of a key, the least share (squared, as the metric measures) that the keys before it do not have


class AlikeError(ValueError):
    """Keys that no change can tell apart: `count` of them, earlier ones among them."""

    def __init__(self, layer: int, count: int) -> None:
        super().__init__(
            f"layer {layer}: {count} keys, earlier ones among them, cannot be told apart: two requests have the same "
            "one, or the metric leaves no direction for them. Leave out the earlier edit that is redone"
        )


Apply = Callable[[torch.Tensor], torch.Tensor]


def deflated(
    metric: Metric, layer: int, keys: torch.Tensor, earlier: Sequence[torch.Tensor], epsilon: float = 1.0
) -> Deflated:
    """N' behind `earlier` (a [d, m] each) for keys [d, n]: of the last call, as far as the history is the same.

    It is kept beside the moments, for as many layers and settings as they keep factors.
    """
    if metric.moments is None or not earlier:
        return Deflated(metric, layer, keys, epsilon).behind(earlier)
    kept, moment = metric.moments.deflations, metric.moments[layer]
    name = (layer, metric.name, epsilon, str(keys.device))
    deflation = kept.pop(name, None)  # out of there until it is right again
    if deflation is None or deflation.moment is not moment:
        deflation = Deflated(metric, layer, keys, epsilon, moment)
    kept[name] = deflation.behind(earlier)
    while len(kept) > max(1, metric.moments.factors.limit):
        kept.popitem(last=False)
    return deflation


class Deflated:
    """keys: of which width and device. moment: whose metric it is, where it is kept for the next call."""

    def __init__(
        self, metric: Metric, layer: int, keys: torch.Tensor, epsilon: float, moment: Moment | None = None
    ) -> None:
        self.metric, self.layer, self.epsilon, self.moment = metric, layer, epsilon, moment
        self.width, self.device = len(keys), keys.device
        self._begin([])

    def _begin(self, earlier: Sequence[torch.Tensor]) -> None:
        """With all of `earlier` folded into the metric."""
        if earlier:
            self._base = self.metric.folded(self.layer, torch.cat([self._here(block) for block in earlier], 1))
        else:
            self._base = lambda keys: self.metric.apply(self.layer, keys)
        self._blocks = [block.clone() for block in earlier]  # a copy: the caller may write to his
        self._folded = len(earlier)
        self._z = torch.empty(self.width, 0, dtype=torch.float64, device=self.device)  # columns beyond `_held` are room
        self._next: tuple[torch.Tensor, torch.Tensor] | None = None  # the last keys solved for, and their columns of Z

    def _here(self, block: torch.Tensor) -> torch.Tensor:
        return block.to(self.device, torch.float64)

    @property
    def _held(self) -> int:
        """Columns of Z in use."""
        return sum(block.shape[1] for block in self._blocks[self._folded :])

    def behind(self, earlier: Sequence[torch.Tensor]) -> Deflated:
        """Be N' of this history. ValueError where epsilon is 0 and its keys are not independent."""
        same = 0
        while same < min(len(earlier), len(self._blocks)) and _same(self._blocks[same], earlier[same]):
            same += 1
        if same < self._folded:
            self._begin([])
            same = 0
        longer = len(self._blocks) > same
        self._blocks = self._blocks[:same]
        rest = list(earlier[same:])
        if self.epsilon and self._held + sum(block.shape[1] for block in rest) > self.width // 2:
            self._begin(earlier)
            return self
        if rest and self._next is not None and not longer and torch.equal(self._next[0], self._here(rest[0])):
            self._join(self._next[1], rest[:1])
            del rest[0]
        if rest:
            self._join(self._columns(torch.cat([self._here(block) for block in rest], 1))[0], rest)
        self._next = None
        return self

    def _join(self, columns: torch.Tensor, blocks: Sequence[torch.Tensor]) -> None:
        held, count = self._held, self._held + columns.shape[1]
        if count > self._z.shape[1]:
            larger = self._z.new_empty(self.width, max(count, min(2 * count, self.width // 2)))
            larger[:, :held] = self._z[:, :held]
            self._z = larger
        self._z[:, held:count] = columns
        self._blocks = [*self._blocks, *(block.clone() for block in blocks)]

    def apply(self, keys: torch.Tensor) -> torch.Tensor:
        """N' K."""
        return self._less(self._base(keys), keys)[0]

    def _less(self, cheap: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """N' K from N K, and (Z^T K)^T; as rows, which is how keys lie in memory."""
        z = self._z[:, : self._held]
        taken = keys.T @ z  # [n, m]
        return torch.addmm(cheap.T, taken, z.T, alpha=-1).T, taken

    def _columns(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What keys [d, n] would add to Z, N' K L^-T [d, n], and L [n, n]."""
        if not bool(keys.isfinite().all()):
            raise ValueError(f"keys of layer {self.layer} are not finite")
        cheap = self._base(keys)
        left, taken = self._less(cheap, keys)
        small = keys.T @ cheap
        small = (small + small.T) / 2
        alone = small.diagonal().clone()
        small -= taken @ taken.T
        small.diagonal().add_(self.epsilon)
        lower, info = torch.linalg.cholesky_ex(small)
        alike = not self.epsilon and bool((lower.diagonal().square() < ALIKE * alone).any())
        if int(info) or alike:
            raise AlikeError(self.layer, self._held + len(small))
        return torch.linalg.solve_triangular(lower, left.T, upper=False).T, lower

    def solve(self, keys: torch.Tensor) -> torch.Tensor:
        """S [d, n] for keys [d, n], float64."""
        columns, lower = self._columns(keys)
        if self.moment is not None and self._held + keys.shape[1] <= self.width // 2:
            self._next = (keys.clone(), columns)
        return torch.linalg.solve_triangular(lower.T, columns.T, upper=True).T  # N' K L^-T L^-1

    def inverse(self, keys: torch.Tensor) -> Apply:
        """(N'^-1 + K K^T)^-1 for keys [d, n], epsilon 1."""
        s = self.solve(keys)

        def apply(x: torch.Tensor) -> torch.Tensor:
            if x is keys:
                return s
            cheap = self.apply(x)
            return cheap - s @ (keys.T @ cheap)

        return apply


def _same(mine: torch.Tensor, given: torch.Tensor) -> bool:
    return mine.shape == given.shape and mine.dtype == given.dtype and torch.equal(mine, given.to(mine.device))
