"""Groups of records, measured before and after their edits; a case file each where there is a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from ..datasets.records import Record
from ..editing.edit import Edit
from ..editing.rows import EditedRows
from ..files import write_json
from ..model import EditableModel
from .edited import Edited
from .nll import score
from .texts import Texts


class Method(Protocol):
    """Makes the edits of a group of records: one for each, or, where `together`, one for all of them."""

    together: bool

    def __call__(self, records: Sequence[Record]) -> Sequence[Edit] | Edit: ...

    def describe(self) -> dict[str, Any]:
        """What tells its edits from those of others: name, parameters, seed (JSON)."""
        ...


@dataclass
class Job:
    """What is to be measured, see `evaluate`. own: an edit a record, or what makes them; None: `edit` (or none) holds
    for all. num_edits: facts changed at once, part of a case file's name."""

    model: EditableModel
    ask: Callable[..., Any]
    records: Sequence[Record]
    edit: Edit | None
    own: Sequence[Edit] | Method | None
    num_edits: int
    baseline: bool
    attributes: bool
    compat: str | None
    texts: Texts | None
    time: float | Sequence[float] | None
    max_rows: int | None
    out: Path | None
    cases: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._shared = None if self.edit is None else Edited(self.model, self.edit)

    def run(self, numbers: Sequence[int]) -> None:
        """Measure the records `numbers`, a group; nothing is done where all their files are there."""
        if self.out is not None and all(self._path(n).exists() for n in numbers):
            return
        began = perf_counter()
        own = self._own(numbers)
        taken = None
        if callable(self.own):
            taken = (perf_counter() - began) / (1 if self.own.together else len(numbers))
        found = {n: self._case(n, numbers, own, taken) for n in numbers}
        for part, edited in self._units(numbers, own):
            before = self.baseline or (edited is None and own is None)
            for n, measured in zip(part, self._measure(part, edited, before), strict=True):
                found[n] |= measured
        for n, case in found.items():
            if self.out is None:
                self.cases.append(case)
            elif not self._path(n).exists():
                write_json(self._path(n), case)

    def _own(self, numbers: Sequence[int]) -> Sequence[Edit] | Edit | None:
        """The edits of these records alone."""
        if self.own is None:
            return None
        return self.own([self.records[n] for n in numbers]) if callable(self.own) else [self.own[n] for n in numbers]

    def _units(
        self, numbers: Sequence[int], own: Sequence[Edit] | Edit | None
    ) -> Iterator[tuple[Sequence[int], Edited | None]]:
        """Records that one pass can measure, with their edits: dense ones go one by one."""
        if own is None:
            yield numbers, self._shared
        elif isinstance(own, Edit) or EditedRows.possible(own):
            yield numbers, Edited(self.model, own)
        else:
            for n, edit in zip(numbers, own, strict=True):
                yield [n], Edited(self.model, edit)

    def _measure(self, numbers: Sequence[int], edited: Edited | None, before: bool) -> list[dict[str, Any]]:
        """{"pre": ..., "post": ...} of each record."""
        records = [self.records[n] for n in numbers]
        asked = [self.ask(self.model, r, k, self.attributes, self.compat) for k, r in enumerate(records)]
        questions = [question for each, _ in asked for question in each]
        sides = dict(zip(("pre", "post"), score(self.model, questions, edited, before, self.max_rows), strict=True))
        found: list[dict[str, Any]] = [{} for _ in records]
        for when, scores in sides.items():
            if scores is None:
                continue
            left = iter(scores)
            for case, (each, read) in zip(found, asked, strict=True):
                case[when] = read([next(left) for _ in each])
            if self.texts is not None:
                written = self.texts.measure(records, edited if when == "post" else None)
                for case, measured in zip(found, written, strict=True):
                    case[when] |= measured
        return found

    def _case(
        self, n: int, group: Sequence[int], own: Sequence[Edit] | Edit | None, taken: float | None
    ) -> dict[str, Any]:
        together = [n] if isinstance(own, Sequence) else range(len(self.records)) if own is None else group
        case = {
            "case_id": self.records[n]["case_id"],
            "grouped_case_ids": [self.records[k]["case_id"] for k in together],
            "num_edits": self.num_edits,
            "requested_rewrite": self.records[n]["requested_rewrite"],
        }
        if self.time is not None:
            taken = self.time if isinstance(self.time, (int, float)) else self.time[n]
        return case if taken is None else case | {"time": taken}

    def _path(self, n: int) -> Path:
        return Path(self.out) / "cases" / f"{self.num_edits}_edits-case_{self.records[n]['case_id']}.json"
