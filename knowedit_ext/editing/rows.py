"""Many edits of one model in one batch: each row is computed under its own, the weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..model.families import device_of
from ..model.load import EditableModel
from ..model.weights import Weight
from ..model.wrappers import eager
from .belongs import check_base
from .changes import LowRank, in_float32
from .edit import Edit, originals
from .placing import weights_of

Hook = Callable[[nn.Module, tuple, Tensor], Tensor]


class Factors(NamedTuple):
    """Changes of one weight by several edits, of ranks so near that padding with zeros costs less than a half.

    left [n, d_out, rank] and right [n, d_in, rank], each the transpose of what is in memory. of_edit [edits + 1]: an
    edit's place among the n or -1; its last entry stands for index -1.
    """

    left: Tensor
    right: Tensor
    of_edit: Tensor


class EditedRows:
    """Edits of one model for batches whose rows are each computed under an edit of their own.

    An edit's change W x + left (right^T x) is added to the output of the changed module in float32 (float64 in a
    float64 model) and rounded once. `Edit.apply` rounds the summed weight instead, so in bfloat16 or float16 results
    differ by those roundings. The factors are kept in that dtype, where the weights are.

    first_layer: the lowest decoder layer that any edit changes (the number of layers when none does): below it all rows
    are the unedited model's.

    Raises:
        ValueError: an edit belongs to another model, is dense, or changes what is not a linear map in a decoder layer.
    """

    def __init__(self, model: EditableModel, edits: Sequence[Edit]) -> None:
        self.size = len(edits)
        changes: dict[str, dict[int, LowRank]] = {}  # weight -> edit -> change
        for number, edit in enumerate(edits):
            for name in edit.changes:
                changes.setdefault(name, {})[number] = _low_rank(edit, number, name)
        weights = _checked_weights(model, edits)
        numbers = {name: next(iter(changes[name])) for name in changes}
        self.first_layer = min((_layer(model, weights[n], numbers[n]) for n in changes), default=model.num_layers)
        self._modules = {name: weights[name].module for name in changes}
        kind = torch.promote_types(model.dtype, torch.float32)
        self._factors = {
            name: self._gather(changes[name], device_of(module) or model.device, kind)
            for name, module in self._modules.items()
        }

    @staticmethod
    def possible(edits: Sequence[Edit]) -> bool:
        """Whether all changes of the edits are low-rank: dense ones must be applied to the weights, one by one."""
        return all(isinstance(change, LowRank) for edit in edits for change in edit.changes.values())

    @contextmanager
    def rows(self, index: Tensor) -> Iterator[None]:
        """Inside it the model's layers compute every row under its edit. Without gradients: use torch.no_grad().

        index: integers, one for each row of packed [1, rows, hidden] input, or one for each sequence of
        [batch, tokens, hidden] input: the number of its edit, -1: the unedited model.

        Raises:
            ValueError: index is no list of integers, or (from the model's forward) fits neither rows nor sequences.
            IndexError: there is no such edit.
        """
        index = self._checked(index)
        with eager(), ExitStack() as stack:
            for name, module in self._modules.items():
                stack.callback(module.register_forward_hook(_add_own(name, self._factors[name], index)).remove)
            yield

    def _gather(self, changes: dict[int, LowRank], device: torch.device, kind: torch.dtype) -> list[Factors]:
        near: dict[int, list[int]] = {}  # edits by the power of two that bounds their rank
        for number, change in changes.items():
            near.setdefault((change.rank - 1).bit_length(), []).append(number)
        factors = []
        for numbers in near.values():
            right, left = (
                _stack([getattr(changes[n], side).to(device, kind) for n in numbers]) for side in ("inputs", "outputs")
            )
            of_edit = torch.full((self.size + 1,), -1)
            of_edit[numbers] = torch.arange(len(numbers))
            factors.append(Factors(left, right, of_edit))
        return factors

    def _checked(self, index: Tensor) -> Tensor:
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"index must be integers [rows] or [batch], got {index.dtype} {list(index.shape)}")
        index = index.detach().to("cpu", torch.int64)
        bad = index[(index < -1) | (index >= self.size)]
        if len(bad):
            raise IndexError(f"index holds {int(bad[0])}: there are {self.size} edits (-1: none)")
        return index


def _stack(factors: list[Tensor]) -> Tensor:
    """[d, rank] each -> [n, d, highest rank], padded with zeros, contiguous along d."""
    stacked = factors[0].new_zeros(len(factors), max(f.shape[1] for f in factors), factors[0].shape[0])
    for to, factor in zip(stacked, factors, strict=True):
        to[: factor.shape[1]] = factor.T
    return stacked.mT


def _low_rank(edit: Edit, number: int, name: str) -> LowRank:
    change = edit.changes[name]
    if not isinstance(change, LowRank):
        raise ValueError(
            f"edit {number} ({edit.method}) changes '{name}' by a dense tensor, which rows of one batch cannot have "
            "to themselves: apply such edits one by one"
        )
    return change


def _layer(model: EditableModel, weight: Weight, number: int) -> int:
    """The decoder layer of a linear map's weight; ValueError where a forward hook could not stand in for its change."""
    inside = (n for n, layer in enumerate(model.modules.layers) if any(m is weight.module for m in layer.modules()))
    layer = next(inside, None)
    if layer is None or weight.input_first is None:
        raise ValueError(
            f"edit {number} changes '{weight.name}', which is no linear map in a decoder layer: apply such edits one "
            "by one"
        )
    return layer


def _checked_weights(model: EditableModel, edits: Sequence[Edit]) -> dict[str, Weight]:
    """The weights that edits change, each edit checked against the model; weights are read once for edits of a base."""
    checked: list[tuple] = []
    replaced = originals(model)
    weights: dict[str, Weight] = {}
    for number, edit in enumerate(edits):
        try:
            weights |= weights_of(model, edit.changes, edit.model)
            edit.check_not_applied(model)
            for name, change in edit.changes.items():
                in_float32(name, change)
        except ValueError as error:
            raise ValueError(f"edit {number}: {error}") from None
        if (edit.base, edit.model) not in checked:
            check_base(edit.base, edit.model, model, replaced)
            checked.append((edit.base, edit.model))
    return weights


def _add_own(name: str, factors: list[Factors], index: Tensor) -> Hook:
    """A forward hook on module `name` that adds each row's own change; index as in `EditedRows.rows`, on the CPU."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        y = output.reshape(-1, output.shape[-1])
        x = args[0].reshape(len(y), -1).to(y.dtype)
        of_row = _index_of_rows(name, index, output.shape[:-1])
        for left, right, of_edit in factors:
            own = of_edit[of_row].to(y.device)
            ops.low_rank_rows(y, x, left.to(y.device), right.to(y.device), own)
        return y.view_as(output)

    return hook


def _index_of_rows(name: str, index: Tensor, shape: torch.Size) -> Tensor:
    rows = shape.numel()
    if len(index) == rows:
        return index
    if len(shape) == 2 and len(index) == shape[0]:
        return index.repeat_interleave(shape[1])
    raise ValueError(
        f"the index of edits has {len(index)} entries, but '{name}' was called with {list(shape)} rows: expected one "
        f"entry for each of the {rows} rows or of the {shape[0]} sequences"
    )
