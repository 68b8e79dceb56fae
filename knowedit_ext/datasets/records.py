"""Records of a data set, checked one by one: a bad one is named, and left out only where that was asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from reprlib import repr as brief
from types import NoneType
from typing import Any, NamedTuple

from .. import documents
from ..checks import Count, as_type, quoted
from ..model import spelling
from ..runs.files import file_name
from ..world.store import WORLD, world_facts, world_records

logger = logging.getLogger(__name__)

REWRITE = "requested_rewrite."
NAMED = 5  # bad records that one error spells out
Record = dict[str, Any]
Source = str | Path | Iterable[Mapping[str, Any]]


class BadRecord(NamedTuple):
    """A record that cannot be used: its place in the source, its case_id (None: unreadable), the key and why."""

    index: int
    case_id: int | str | None
    key: str
    reason: str

    def __str__(self) -> str:
        case = "" if self.case_id is None else f" (case_id {self.case_id})"
        key = f"'{self.key}' " if self.key else ""
        return f"record {self.index}{case}: {key}{self.reason}"


class Records(list[Record]):
    """A list of checked records; `bad` lists those that were left out of it (a slice is a plain list)."""

    def __init__(self, records: Iterable[Record] = (), bad: Iterable[BadRecord] = ()) -> None:
        super().__init__(records)
        self.bad = list(bad)


class Problem(Exception):
    """What makes one record bad."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason


def read_json(path: str | Path, kind: type, expected: str, keep: Callable[[dict], Any] | None = None) -> Any:
    """The content of a JSON file, which has to be of this kind (`expected` says it in words).

    A list may be written as JSON lines, too: an object a line, see `documents.holds_lines`.
    """
    lines = kind is list and documents.holds_lines(path)
    value = documents.read_json_lines(path, keep) if lines else documents.read_json(path, keep)
    if not isinstance(value, kind):
        raise ValueError(f"'{path}' holds a {type(value).__name__}, expected {expected}")
    return value


def read_records(source: Source, what: str = "records") -> list[Any]:
    """The records in a file (JSON, or JSON lines), or in memory, as a list; what one of them is, is not looked at.

    "world" stands for the built-in world's records, or facts."""
    if isinstance(source, (str, Path)) and str(source) == WORLD:
        return world_facts() if what == "facts" else world_records()
    wanted = "a JSON file's path, or a list (of one, for one alone)"
    if isinstance(source, (str, Path)):
        if not os.path.lexists(source):
            raise FileNotFoundError(f"there is no file '{source}': {what} are {wanted}")
        return read_json(source, list, f"a list of {what}")
    if isinstance(source, (Mapping, bytes)) or not isinstance(source, Iterable):
        raise ValueError(f"{what} are {brief(source)}: expected {wanted}")
    return list(source)


def collect_records(
    source: Source, convert: Callable[[int, Mapping[str, Any]], Record], *, skip_bad: bool, limit: int | None
) -> Records:
    """The first `limit` records of a file or an iterable, each through `convert`, which raises `Problem`s.

    Raises ValueError that names the bad ones (with `skip_bad`: only where no good one is left).
    """
    limit = as_type("limit", limit, Count | None)
    name = f"'{source}'" if isinstance(source, (str, Path)) else "the records given"
    raw = read_records(source)
    records, seen = Records(), {}  # seen: case_id -> index of the record that has it
    for index, record in enumerate(raw[:limit]):
        try:
            if not isinstance(record, Mapping):
                raise Problem("", f"is a {type(record).__name__}, expected an object")
            good = convert(index, record)
            case = str(good["case_id"])  # it names a file
            if case in seen:
                raise Problem("case_id", f"is the same as that of record {seen[case]}")
        except Problem as problem:
            records.bad.append(BadRecord(index, _case_id(record), problem.key, problem.reason))
        else:
            seen[case] = index
            records.append(good)
    return settle(records, name, skip_bad)


def settle(records: Records, name: str, skip_bad: bool) -> Records:
    """`records`, or a ValueError where it has bad records that may not be skipped, or no good ones."""
    if records.bad and not (skip_bad and records):
        raise ValueError(describe_bad(records.bad, name))
    if not records:
        raise ValueError(f"{name}: no records")
    if records.bad:
        logger.warning("left out: %s", describe_bad(records.bad, name))
    return records


def describe_bad(bad: list[BadRecord], name: str) -> str:
    """The first few bad records, a line each, and how many more there are."""
    more = [f"... and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
    count = "1 bad record" if len(bad) == 1 else f"{len(bad)} bad records"
    return "\n  ".join([f"{name}: {count}", *map(str, bad[:NAMED]), *more])


def _case_id(record: Any) -> int | str | None:
    try:
        return take_case_id(record)
    except (Problem, TypeError):
        return None


def take_case_id(record: Mapping[str, Any]) -> int | str:
    """A whole number, or text that can be part of a file's name."""
    case_id = take(record, "case_id")
    if not isinstance(case_id, str) and not is_number(case_id):
        raise Problem("case_id", f"is {brief(case_id)}, expected a number or text")
    try:
        file_name(case_id, "case_id")
    except ValueError as error:
        raise Problem("case_id", f"is not usable: {error}") from error
    return case_id


def is_number(value: Any) -> bool:
    """A whole number that can be part of a file's name."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def take(record: Mapping[str, Any], key: str, inside: str = "") -> Any:
    """The value of a key that has to be there. `inside`: where `record` itself stands, for the error."""
    if key not in record:
        raise Problem(inside + key, "is missing")
    return record[key]


def take_text(record: Mapping[str, Any], key: str, inside: str = "") -> str:
    return check_text(take(record, key, inside), inside + key)


def take_texts(record: Mapping[str, Any], key: str, inside: str = "", *, least: int = 1) -> list[str]:
    """A list of at least `least` texts; with 0 it may be absent."""
    texts = take(record, key, inside) if least else record.get(key, [])
    if not isinstance(texts, list):
        raise Problem(inside + key, f"is {brief(texts)}, expected a list of texts")
    if len(texts) < least:
        raise Problem(inside + key, "is an empty list")
    return [check_text(text, f"{inside}{key}[{number}]") for number, text in enumerate(texts)]


def check_text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise Problem(key, f"is {brief(value)}, expected text")
    if not value.strip():
        raise Problem(key, "is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise Problem(key, f"is {brief(value)}, with half of a character")
    return value


def check_template(prompt: str, key: str) -> str:
    slots = prompt.count("{}")
    if slots != 1:
        raise Problem(key, f"is {quoted(prompt)}, with {slots or 'no'} '{{}}': exactly one must mark the subject")
    return prompt


def mark_subject(prompt: str, subject: str, key: str) -> str:
    """The prompt with "{}" where its subject stands (as it is where it has a "{}"); see `spelling.mark_subject`."""
    if "{}" in prompt:
        return check_template(prompt, key)
    try:
        return spelling.mark_subject(prompt, subject)
    except ValueError as error:
        raise Problem(key, f"is not usable: {error}") from error


def check_rewrite(record: Mapping[str, Any], targets: Iterable[str]) -> list[str]:
    """Check a record's requested_rewrite: prompt with "{}", subject, and these targets, whose texts are returned."""
    return check_one_rewrite(take(record, "requested_rewrite"), targets, "requested_rewrite")


def check_one_rewrite(rewrite: Any, targets: Iterable[str], name: str) -> list[str]:
    """`check_rewrite` of one that stands at `name`."""
    if not isinstance(rewrite, Mapping):
        raise Problem(name, f"is {brief(rewrite)}, expected an object")
    inside = f"{name}."
    check_template(take_text(rewrite, "prompt", inside), f"{inside}prompt")
    take_text(rewrite, "subject", inside)
    take_space(rewrite, inside)
    texts = []
    for key in targets:
        target = take(rewrite, key, inside)
        if not isinstance(target, Mapping):
            raise Problem(inside + key, f"is {brief(target)}, expected an object with 'str'")
        texts.append(take_text(target, "str", f"{inside}{key}."))
    return texts


def take_space(record: Mapping[str, Any], inside: str = "") -> dict[str, bool]:
    """{"space": ...} of a record that says whether a space stands before its targets, else nothing."""
    space = record.get("space")
    if not isinstance(space, (bool, NoneType)):
        raise Problem(f"{inside}space", f"is {brief(space)}, expected true or false")
    return {} if space is None else {"space": space}


def take_objects(record: Mapping[str, Any], key: str, inside: str = "", least: int = 0) -> list[Mapping[str, Any]]:
    """A list of at least `least` objects; with 0 it may be absent."""
    items = take(record, key, inside) if least else record.get(key, [])
    if not isinstance(items, list):
        raise Problem(inside + key, f"is {brief(items)}, expected a list of objects")
    if len(items) < least:
        raise Problem(inside + key, "is an empty list")
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise Problem(f"{inside}{key}[{number}]", f"is {brief(item)}, expected an object")
    return items


def check_pairs(record: Mapping[str, Any], key: str, inside: str = "", least: int = 0) -> None:
    """A list of {"prompt", "target"} texts, where the record has one; a pair may have a list of "aliases"."""
    for number, pair in enumerate(take_objects(record, key, inside, least)):
        for part in ("prompt", "target"):
            take_text(pair, part, f"{inside}{key}[{number}].")
        take_texts(pair, "aliases", f"{inside}{key}[{number}].", least=0)
