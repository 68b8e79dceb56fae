"""Does the model compute with a weight that was changed? One row through the module says so, before and after.

Writing to a weight is no proof: quantised layers, fused kernels and some adapters compute with a copy of their own.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ..model.families import device_of
from ..model.hooks import resting
from ..model.load import EditableModel
from ..model.precision import float32_products
from ..model.weights import Weight
from .changes import Change, LowRank, largest

SAME = 0.1  # of the change may be missing in the answer: what quantising the activations takes
LARGEST = {torch.float16: 2.0**10}  # of a weight times a probe; in wider types 2^24
ROUNDINGS = 2  # of an answer, of the size of its entries, which add up as a random walk


class Probe:
    """Looks at a weight's module before a change (when made) and after it (`check`).

    A weight of a linear map that is written is asked for the column that changes most, by a row with one entry: without
    an adapter the answer is that column, bit for bit. One beside which the change stands is asked along the change. An
    embedding is asked for the row that changes most. Other weights are plain parameters of plain modules.
    """

    def __init__(self, weight: Weight, change: Change, model: EditableModel) -> None:
        """change: as it is put in force: the factors beside a weight, else a dense one."""
        self.weight, self.change, self.model = weight, change, model
        self.device = device_of(weight.module) or model.device
        self.row: torch.Tensor | None = None
        if isinstance(change, LowRank):
            self.row = _along(change).to(self.device, model.dtype)
        elif isinstance(weight.holder, nn.Embedding):
            self.row = _most(change, 1).view(1, 1).to(self.device)
        elif weight.input_first is not None:
            self.column = int(_most(change, 1 if weight.input_first else 0))
            self.row = self._one_entry()
        self.before = self._answer()

    def check(self, stored_before: torch.Tensor | None) -> None:
        """ValueError where the answer is not the one from before and the change. stored_before: the weight then."""
        if self.row is None:
            return
        after, before = self._answer(), self.before
        if isinstance(self.change, LowRank):
            inputs, outputs = (x.to(self.device, torch.float64) for x in (self.change.inputs, self.change.outputs))
            seen = self._near(after, before, (self.row[0].double() @ inputs) @ outputs.T)
        elif isinstance(self.weight.holder, nn.Embedding):
            was, now = (stored[int(self.row)] for stored in (stored_before, self.weight.parameter))
            seen = torch.equal(was, now) or not torch.equal(after, before)
        else:
            entry = float(self.row.max())
            was, now = (entry * self._column(w).double() for w in (stored_before, self.weight.parameter.detach()))
            if torch.equal(before.double(), was):  # nothing but the weight's column, and a bias where that is small now
                seen = bool((after.double() - now).norm() <= SAME * (now - was).norm())
            else:
                seen = self._near(after, before, now - was)
        if not seen:
            raise ValueError(
                f"the model does not compute with '{self.weight.name}' as it was changed: its "
                f"{type(self.weight.module).__name__} has the weight in another form (quantised, fused, scaled?), so "
                "the edit is not applied; load the model in floating point, without what wraps this layer"
            )

    def _near(self, after: torch.Tensor, before: torch.Tensor, wanted: torch.Tensor) -> bool:
        """Whether the answer has moved along what was wanted, and as far, to the rounding of answers."""
        after, before, wanted = (x.double().cpu() for x in (after, before, wanted))
        far = float(wanted.norm())
        moved = float((after - before) @ wanted) / max(far, 1e-300)
        rounding = ROUNDINGS * torch.finfo(self._answered).eps * float(before.norm() + after.norm())
        return abs(moved - far) <= SAME * far + rounding / len(wanted) ** 0.5

    def _answer(self) -> torch.Tensor | None:
        """[d_out]"""
        if self.row is None:
            return None
        with resting(self.model), float32_products("ieee"):
            answer = self.weight.module(self.row)
        self._answered = answer.dtype
        return answer.detach().reshape(-1).clone()

    def _column(self, weight: torch.Tensor) -> torch.Tensor:
        return weight[self.column] if self.weight.input_first else weight[:, self.column]

    def _one_entry(self) -> torch.Tensor:
        """[1, d_in]: a power of two so large that a bias is rounded away."""
        stored = self.weight.parameter.detach()
        most = LARGEST.get(stored.dtype, 2.0**24)
        reach = float(self._column(stored).abs().max()) + largest(self._column(self.change))
        row = torch.zeros(1, stored.shape[0 if self.weight.input_first else 1], dtype=stored.dtype, device=self.device)
        row[0, self.column] = 2.0 ** math.floor(math.log2(most / max(reach, 1.0)))
        return row


def _most(change: torch.Tensor, dim: int) -> torch.Tensor:
    """Where a dense change is largest, of what remains when it is summed over `dim`."""
    return torch.linalg.vector_norm(change, dim=dim).argmax()


def _along(change: LowRank) -> torch.Tensor:
    """[1, d_in], with entries of about 1: the strongest of the directions that the change reads."""
    inputs, outputs = change.inputs.double(), change.outputs.double()
    strength = torch.linalg.vector_norm(inputs, dim=0) * torch.linalg.vector_norm(outputs, dim=0)
    direction = inputs[:, int(strength.argmax())]
    return (direction * len(direction) ** 0.5 / direction.norm().clamp_min(1e-300))[None]
