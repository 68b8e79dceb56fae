"""Groups of records, measured before and after their edits; a case file each where there is a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..datasets.records import Record
from ..editing.edit import Edit
from ..editing.rows import EditedRows
from ..files import write_json
from ..model import EditableModel
from .edited import Edited
from .nll import score
from .texts import Texts


@dataclass
class Job:
    """What is to be measured, see `evaluate`. own: an edit a record, or None where `edit` (or none) holds for all."""

    model: EditableModel
    ask: Callable[..., Any]
    records: Sequence[Record]
    edit: Edit | None
    own: Sequence[Edit] | None
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
        found = {n: self._case(n) for n in numbers}
        for part, edited in self._units(numbers):
            before = self.baseline or edited is None
            for n, measured in zip(part, self._measure(part, edited, before), strict=True):
                found[n] |= measured
        for n, case in found.items():
            if self.out is None:
                self.cases.append(case)
            elif not self._path(n).exists():
                write_json(self._path(n), case)

    def _units(self, numbers: Sequence[int]) -> Iterator[tuple[Sequence[int], Edited | None]]:
        """Records that one pass can measure, with their edits: dense ones go one by one."""
        if self.own is None:
            yield numbers, self._shared
        elif EditedRows.possible(edits := [self.own[n] for n in numbers]):
            yield numbers, Edited(self.model, edits)
        else:
            for n in numbers:
                yield [n], Edited(self.model, self.own[n])

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

    def _case(self, n: int) -> dict[str, Any]:
        record = self.records[n]
        case = {
            "case_id": record["case_id"],
            "grouped_case_ids": [record["case_id"]] if self.own is not None else self._ids,
            "num_edits": self._edits,
            "requested_rewrite": record["requested_rewrite"],
        }
        if self.time is not None:
            case["time"] = self.time if isinstance(self.time, (int, float)) else self.time[n]
        return case

    @property
    def _ids(self) -> list[int]:
        return [record["case_id"] for record in self.records]

    @property
    def _edits(self) -> int:
        """Facts changed at once."""
        if self.own is not None:
            return 1
        return 0 if self.edit is None else len(self.edit.requests)

    def _path(self, n: int) -> Path:
        return Path(self.out) / "cases" / f"{self._edits}_edits-case_{self.records[n]['case_id']}.json"
