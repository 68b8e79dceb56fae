"""Editing methods as what an evaluation asks for its edits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..datasets.records import Record
from ..editing.edit import Edit
from ..editing.kept_values import KeptValues, check_keeps, keep_values
from ..editing.methods import method_of
from ..editing.params import LayerParams
from ..editing.request import requests_of
from ..model.identity import checksum
from ..model.load import EditableModel
from ..moments import Moments


@dataclass
class Editing:
    """Makes the edits of a group of records by one method (`evaluation.job.Method`).

    name: one of `editing.methods.METHODS`. together: one edit of all records of a group (what `num_edits` is in the
    published code); else one a record, each made on the model as it is. The facts of a record that has several are
    edited together, or, by a method of single facts, one on top of the other. contexts: None: generated with `seed`,
    once. values: of all facts that are to be edited, see `keep`; None: computed with each edit.
    """

    model: EditableModel
    name: str
    params: LayerParams
    moments: Moments | None = None
    together: bool = False
    seed: int = 0
    compat: str | None = None
    contexts: Any = None
    values: KeptValues | None = None

    def __post_init__(self) -> None:
        self.method = method_of(self.name)
        self.params = self.method.params_of(self.params)
        if self.method.single and self.together:
            raise ValueError(f"{self.name} edits one fact at a time: other methods edit many at once (memit)")

    def __call__(self, records: Sequence[Record]) -> Sequence[Edit] | Iterator[Edit] | Edit:
        if self.together:
            return self._edit(records)
        if self.method.each is not None and not any(map(_several, records)):
            return self.method.each(self.model, records, self.params, **self._options(records))
        if self.values is not None:
            return [self._edit(record) for record in records]
        # One at a time: dense edits are as large as the weights.
        return (self._edit(record) for record in records)

    def keep(self, records: Sequence[Record], store: str | Path, progress: bool = False) -> None:
        """Have the values of all these records' facts computed into a folder, where other runs find them, and edit by
        them (docs/folders.md). All ranks of a run call this: each computes a share.

        ValueError for a method that has no values, for records whose facts it edits one on top of the other, and for a
        folder of other values.
        """
        check_keeps(self.method, self.params)
        if self.method.single and (several := next(filter(_several, records), None)) is not None:
            raise ValueError(
                f"case_id {several['case_id']}: {self.name} edits its facts one on top of the other, so their values "
                "depend on each other: none are kept"
            )
        options = {"contexts": self._contexts(), "compat": self.compat, "progress": progress}
        self.values = keep_values(self.method, self.model, records, self.params, store, **options)

    def _edit(self, records: Sequence[Record] | Record) -> Edit:
        requests = requests_of(records)
        if len(requests) == 1 or not self.method.single:
            return self.method.edit(self.model, records, self.params, **self._options(records))
        made = None  # facts that belong together, one on top of the other
        for request in requests:
            with nullcontext() if made is None else made.applied(self.model):
                edit = self.method.edit(self.model, request, self.params, **self._options())
            made = edit if made is None else Edit.merge([made, edit])
        return made

    def _contexts(self) -> Any:
        if self.contexts is None and self.method.contexts is not None:  # generated once for all records, as published
            self.contexts = self.method.contexts(self.model, self.params, self.seed)
        return self.contexts

    def _options(self, records: Sequence[Record] | Record | None = None) -> dict[str, Any]:
        """records: those whose values, where they are kept, are what is edited by."""
        given = [records] if isinstance(records, Mapping) else records
        kept = None if self.values is None or given is None else self.values.rows(given)
        there = {"moments": self.moments, "contexts": self._contexts(), "compat": self.compat, "values": kept}
        return {option: value for option, value in there.items() if self.method.takes(option)}

    def describe(self) -> dict[str, Any]:
        used = [] if self.moments is None else [n for n in self.params.layers if n in self.moments]
        return {
            "method": self.name,
            "params": self.params.to_dict(),
            "moments": {str(n): [self.moments[n].count, checksum(self.moments[n].matrix())] for n in used},
            "seed": self.seed,
            "compat": self.compat,
            "together": self.together,
        }


def _several(record: Record) -> bool:
    return isinstance(record["requested_rewrite"], list)
