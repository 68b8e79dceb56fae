"""What a model is evaluated under: one edit for all records, or an edit of its own for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from ..editing.edit import Edit
from ..editing.rows import EditedRows
from ..model.load import EditableModel
from ..model.weights import find_weight


class Edited:
    """One edit, whose weights stand in for the model's while asked for; or many, each row computed under its own.

    first_layer: the lowest decoder layer that differs from the unedited model (the number of layers where only the
    final norm or the head do). changes_embedding: what enters the layers differs too.
    """

    def __init__(self, model: EditableModel, edits: Edit | Sequence[Edit]) -> None:
        if isinstance(edits, Edit):
            layers = [_layer(model, name) for name in edits.changes]
            self.changes_embedding = -1 in layers
            self.first_layer = max(0, min(layers, default=model.num_layers))
            self._under = _one(model, edits)
        else:
            many = EditedRows(model, edits)
            self.changes_embedding, self.first_layer, self._under = False, many.first_layer, many.rows

    @contextmanager
    def rows(self, index: torch.Tensor) -> Iterator[None]:
        """The model as edited; index: for each packed row (or each sequence of a batch) the number of its edit."""
        with self._under(index):
            yield


def _one(model: EditableModel, edit: Edit) -> Callable[[torch.Tensor], AbstractContextManager]:
    """Applying takes a product of large matrices; the weights it gives are kept, and swapped in and out."""
    changed = [find_weight(model.hf, name).parameter for name in edit.changes]
    if any(p is None for p in changed):  # a side path of a quantised weight
        return lambda index: edit.applied(model)
    with edit.applied(model):
        weights = [p.detach().clone() for p in changed]

    @contextmanager
    def swapped(index: torch.Tensor) -> Iterator[None]:
        before = [p.data for p in changed]
        try:
            for parameter, weight in zip(changed, weights, strict=True):
                parameter.data = weight
            yield
        finally:
            for parameter, weight in zip(changed, before, strict=True):
                parameter.data = weight

    return swapped


def _layer(model: EditableModel, parameter: str) -> int:
    """The decoder layer that a parameter belongs to; -1: the embedding side; the number of layers: behind them all."""
    modules, family = model.modules, model.modules.family
    start = f"{family.base}.{family.layers}."
    if parameter.startswith(start):
        return int(parameter[len(start) :].partition(".")[0])
    value = find_weight(model.hf, parameter).parameter
    if any(value is p for p in modules.embedding.parameters()):  # a tied head is one with the embedding
        return -1
    behind = (*modules.final_norm.parameters(), *modules.head.parameters())
    return model.num_layers if any(value is p for p in behind) else -1
