"""Values on their way: Adam's state of many edits at once, each moved as if alone, and the rows read of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from .params import EditParams

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch.optim.Adam's


@dataclass(frozen=True)
class ReadRows:
    """Rows that are read out: at, owner: int64 [rows], which and whose (its place among the edits); weight; target."""

    at: torch.Tensor
    owner: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor

    def sums(self, values: torch.Tensor, edits: int) -> torch.Tensor:
        """[rows] -> weighted sums by edit [edits]."""
        return values.new_zeros(edits).index_add(0, self.owner, values * self.weight)


@dataclass
class InProgress:
    """What is kept of the edits in progress, where the model computes: [edits, sites, hidden] or [edits].

    weight: of the target's negative log-probability; stuck: no gradient reached the value.
    """

    initial: torch.Tensor
    delta: torch.Tensor
    moment: torch.Tensor
    variance: torch.Tensor
    weight: torch.Tensor
    minimise: torch.Tensor
    updates: torch.Tensor
    impatient: torch.Tensor
    alive: torch.Tensor
    stuck: torch.Tensor

    @classmethod
    def begin(cls, initial: torch.Tensor, weight: float, *given: torch.Tensor) -> InProgress:
        zeros, n, device = (torch.zeros_like(initial) for _ in range(3)), len(initial), initial.device
        alive = torch.ones(n, dtype=torch.bool, device=device)
        weights = torch.full((n,), weight, device=device)
        return cls(initial, *zeros, weights, *(x.to(device) for x in given), alive, torch.zeros_like(alive))

    def move(self, gradient: torch.Tensor, step: int, params: EditParams) -> None:
        """One step of Adam for those that are alive, then onto their L2 ball."""
        self.stuck = self.alive & ~gradient.flatten(1).any(dim=1)
        moment = BETAS[0] * self.moment + (1 - BETAS[0]) * gradient
        variance = BETAS[1] * self.variance + (1 - BETAS[1]) * gradient**2
        size = (variance.sqrt() / (1 - BETAS[1] ** (step + 1)) ** 0.5).add_(EPSILON)
        moved = self.delta.detach() - params.v_lr / (1 - BETAS[0] ** (step + 1)) * moment / size
        most = params.clamp_norm_factor * self.initial.norm(dim=-1, keepdim=True)
        norm = moved.norm(dim=-1, keepdim=True)
        alive = self.alive[:, None, None]
        self.moment, self.variance = (
            torch.where(alive, moment, self.moment),
            torch.where(alive, variance, self.variance),
        )
        self.delta = torch.where(alive, torch.where(norm > most, moved * (most / norm), moved), self.delta.detach())

    def only(self, edits: Sequence[int]) -> InProgress:
        index = torch.tensor(edits, device=self.delta.device)
        return InProgress(*(getattr(self, field.name)[index] for field in fields(self)))
