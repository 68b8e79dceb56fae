"""Groups of records, measured before and after their edits; a case file each where there is a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

from ..datasets.records import Record
from ..editing.edit import Edit
from ..model.load import EditableModel
from ..runs.files import file_name, load_json, write_json
from .edited import Edited
from .nll import score
from .texts import Texts


@runtime_checkable
class Method(Protocol):
    """Makes the edits of a group of records: one for each (at once, or one after the other as they are asked for), or,
    where `together`, one for all of them."""

    together: bool

    def __call__(self, records: Sequence[Record]) -> Sequence[Edit] | Iterator[Edit] | Edit: ...

    def describe(self) -> dict[str, Any]:
        """What tells its edits from those of others: name, parameters, seed (JSON)."""
        ...


@dataclass
class Job:
    """What is to be measured, see `evaluate`. ids: of all records that the folder is for; `records` may be the first of
    them. own: an edit a record, or what makes them; None: `edit` (or none) holds for all. num_edits: facts changed at
    once, part of a case file's name."""

    model: EditableModel
    ask: Callable[..., Any]
    records: Sequence[Record]
    ids: Sequence[int]
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

    def done(self, numbers: Sequence[int]) -> bool:
        return self.out is not None and all(self._path(n).exists() for n in numbers)

    def check(self, numbers: Iterable[int]) -> None:
        """ValueError for a case that is damaged, or was altered; before hours are spent on the others."""
        for n in numbers:
            if self.out is not None and self._path(n).exists():
                load_json(self._path(n), sealed=True)

    def name_all(self) -> None:
        """Have every case of a shared edit name all records: there may be more than when it was written."""
        for n in range(len(self.records)) if self.edit is not None else ():
            case = load_json(self._path(n), sealed=True)
            if case["grouped_case_ids"] != self.ids:
                write_json(self._path(n), case | {"grouped_case_ids": self.ids}, sealed=True)

    def run(self, numbers: Sequence[int]) -> None:
        """Measure the records `numbers`, a group; nothing is done where all their files are there."""
        if self.done(numbers):
            return
        cases = {n: self._case(n, numbers) for n in numbers}
        for part, edited, taken in self._units(numbers):
            before = self.baseline or edited is None
            for n, measured in zip(part, self._measure(part, edited, before), strict=True):
                cases[n] |= measured if taken is None else {"time": taken} | measured
        for n, case in cases.items():
            if self.out is None:
                self.cases.append(case)
            elif not self._path(n).exists():
                write_json(self._path(n), case, sealed=True)

    def _units(self, numbers: Sequence[int]) -> Iterator[tuple[Sequence[int], Edited | None, float | None]]:
        """Records that one pass can measure, their edits, and the seconds that making one took where it was made here.

        Dense edits, and others that rows cannot have each of their own, go one by one.
        """
        if self.own is None:
            yield numbers, self._shared, None
            return
        made = callable(self.own)
        began = perf_counter()
        own = self.own([self.records[n] for n in numbers]) if made else [self.own[n] for n in numbers]
        if isinstance(own, Edit):
            yield numbers, Edited(self.model, own), perf_counter() - began if made else None
        elif isinstance(own, Sequence):
            taken = (perf_counter() - began) / len(numbers) if made else None
            try:
                parts = [(numbers, Edited(self.model, own))]
            except ValueError:  # applied alone each will work, or say why not
                parts = (([n], Edited(self.model, edit)) for n, edit in zip(numbers, own, strict=True))
            yield from ((part, edited, taken) for part, edited in parts)
        else:
            for n in numbers:
                began = perf_counter()
                edit = next(own)
                yield [n], Edited(self.model, edit), perf_counter() - began

    def _measure(self, numbers: Sequence[int], edited: Edited | None, before: bool) -> list[dict[str, Any]]:
        """{"pre": ..., "post": ...} of each record."""
        records = [self.records[n] for n in numbers]
        asked = [self.ask(self.model, r, k, self.attributes, self.compat) for k, r in enumerate(records)]
        questions = [question for each, _ in asked for question in each]
        sides = dict(zip(("pre", "post"), score(self.model, questions, edited, before, self.max_rows), strict=True))
        cases: list[dict[str, Any]] = [{} for _ in records]
        for when, scores in sides.items():
            if scores is None:
                continue
            before = sides["pre"] if when == "post" else None
            first = 0
            for case, (each, read) in zip(cases, asked, strict=True):
                part = slice(first, first + len(each))
                case[when] = read(scores[part], None if before is None else before[part])
                first = part.stop
            if self.texts is not None:
                written = self.texts.measure(records, edited if when == "post" else None)
                for case, measured in zip(cases, written, strict=True):
                    case[when] |= measured
        return cases

    def _case(self, n: int, group: Sequence[int]) -> dict[str, Any]:
        if self.edit is not None:
            together = self.ids  # one list, however many cases hold it
        elif self.own is not None and callable(self.own) and self.own.together:
            together = [self.records[k]["case_id"] for k in group]
        else:
            together = [self.records[n]["case_id"]]
        case = {
            "case_id": self.records[n]["case_id"],
            "grouped_case_ids": together,
            "num_edits": self.num_edits,
            "requested_rewrite": self.records[n]["requested_rewrite"],
        }
        if self.time is not None:
            case["time"] = float(self.time[n] if isinstance(self.time, Sequence) else self.time)
        return case

    def _path(self, n: int) -> Path:
        return _path(self.out, self.num_edits, self.records[n]["case_id"])


def _path(out: str | Path, num_edits: int | str, case_id: object) -> Path:
    return Path(out) / "cases" / f"{num_edits}_edits-case_{file_name(case_id, 'case_id')}.json"


def forget(out: str | Path, case_ids: Iterable[int]) -> None:
    """Remove the cases of a group that was not full: rounding, and what is edited together, depend on the group."""
    for case_id in case_ids:
        path = _path(out, "*", case_id)
        for file in path.parent.glob(path.name):
            file.unlink()
