"""Edits by one method, batch after batch on one model: their sum is added to the first weights and rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..datasets.records import Record
from ..editing.edit import Edit
from ..editing.kept_values import KeptValues
from ..model.identity import checksum
from ..model.load import EditableModel
from ..moments import Moments
from .treatment import Treatment

# Weights or values that are no longer finite, systems that cannot be solved, facts that a method refuses.
COLLAPSES = (ValueError, ArithmeticError, torch.linalg.LinAlgError)


class Broken(Exception):
    """Edits, or the model under them, broke: what ends a sequence, and is its result."""


@contextmanager
def breaking() -> Iterator[None]:
    """Where that may happen. Files are read and written outside: a damaged one is nobody's result."""
    try:
        yield
    except COLLAPSES as error:
        raise Broken(f"{type(error).__name__}: {error}") from error


class Stack:
    """now: the sum of all edits so far, which the model has only where `place` put it. Leaves the model as it was when
    `place(None)` is called last. values: of the facts that come first, on the model as it is; others are computed."""

    def __init__(
        self,
        model: EditableModel,
        treatment: Treatment,
        moments: Moments | None,
        seed: int,
        values: KeptValues | None = None,
    ) -> None:
        self.model, self.treatment, self.moments, self.seed, self.values = model, treatment, moments, seed, values
        self.now: Edit | None = None
        self._placed: Edit | None = None

    def add(self, records: Sequence[Record], path: Path) -> None:
        """Edit these on top of all before; kept in a file, and taken from there where it is. Raises `Broken`."""
        if path.exists():
            edit = Edit.load(path)
        else:
            with breaking():
                self.place(self.now)
                edit = self._made(records)
            edit.save(path)
        self.now = _sum(self.now, edit)

    def place(self, edit: Edit | None) -> None:
        """Have the model hold this edit and no other."""
        if edit is not self._placed:
            if self._placed is not None:
                self._placed.revert(self.model)
                self._placed = None
            if edit is not None:
                edit.apply(self.model)
                self._placed = edit

    def _made(self, records: Sequence[Record]) -> Edit:
        if not self.treatment.method.single:
            return self._edit(records, self.now)
        made = None
        for record in records:
            made = _sum(made, self._edit([record], _sum(self.now, made)))
            self.place(_sum(self.now, made))
        return made

    def _edit(self, records: Sequence[Record], before: Edit | None) -> Edit:
        method = self.treatment.method
        options = {"moments": self.moments if self.treatment.uses_moments else None, "seed": self.seed}
        if self.treatment.history and before is not None:
            options["earlier"] = [before]
        if self.values is not None and before is None:
            options["values"] = self.values.rows(records)
        taken = {name: value for name, value in options.items() if method.takes(name)}
        return method.edit(self.model, list(records), self.treatment.params, **taken)


def check_moments(model: EditableModel, chosen: Sequence[Treatment], moments: Moments | None) -> None:
    """ValueError for layers that the model, or the moments, do not have."""
    for treatment in chosen:
        outside = [layer for layer in treatment.params.layers if not 0 <= layer < model.num_layers]
        if outside:
            raise ValueError(f"method '{treatment.label}': layer {outside[0]} is not one of {model.num_layers}")
        if treatment.uses_moments:
            absent = [n for n in treatment.params.layers if moments is None or n not in moments]
            if absent:
                raise ValueError(f"method '{treatment.label}' needs moments of layer {absent[0]}: ke.collect_moments")


def described(treatment: Treatment, moments: Moments | None) -> Mapping[str, Any]:
    """All that its edits depend on beside facts and seed (JSON)."""
    used = treatment.params.layers if moments is not None and treatment.uses_moments else ()
    sums = {str(n): [moments[n].count, checksum(moments[n].matrix())] for n in used}
    return treatment.describe() | {"moments": sums}


def _sum(so_far: Edit | None, edit: Edit | None) -> Edit | None:
    return edit if so_far is None else so_far if edit is None else Edit.merge([so_far, edit])
