"""Known facts (known_1000.json of rome): what causal tracing runs over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..model.facts import Fact
from .records import read_records

REQUIRED = ("known_id", "prompt", "subject", "attribute")


@dataclass(frozen=True)
class KnownFact:
    """A fact with the number that names its files."""

    known_id: int
    fact: Fact


def load_known(source: str | Path | Iterable[Fact | Mapping[str, Any] | KnownFact]) -> list[KnownFact]:
    """Facts from a JSON file in the known_1000 format, from its records, or from `Fact`s (numbered in order).

    A record is {known_id, prompt, subject, attribute, ...}; the prompt spells its subject out (the first occurrence is
    meant, as published) or has a `{}` for it. Raises ValueError that names the record and the key that is wrong.
    """
    name = "the facts given"
    if isinstance(source, (str, Path)):
        name = f"'{source}'"
        source = read_records(source)
    found = [_known(record, number, name) for number, record in enumerate(source)]
    if not found:
        raise ValueError(f"{name}: no facts")
    seen: dict[int, int] = {}
    for number, known in enumerate(found):
        if known.known_id in seen:
            raise ValueError(
                f"records {seen[known.known_id]} and {number} of {name} have the same known_id {known.known_id}"
            )
        seen[known.known_id] = number
    return found


def _known(record: Fact | Mapping[str, Any] | KnownFact, number: int, name: str) -> KnownFact:
    if isinstance(record, KnownFact):
        return record
    if isinstance(record, Fact):
        return KnownFact(number, record)
    where = f"record {number} of {name}"
    if not isinstance(record, Mapping):
        raise ValueError(f"{where} is a {type(record).__name__}, expected an object with {', '.join(REQUIRED)}")
    for key in REQUIRED:
        if key not in record:
            raise ValueError(f"{where} lacks '{key}'")
        kind = int if key == "known_id" else str
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            raise ValueError(f"{where}: '{key}' is {record[key]!r}, expected {'a number' if kind is int else 'text'}")
    try:
        if "{}" in record["prompt"]:
            fact = Fact(record["prompt"], record["subject"])
        else:
            fact = Fact.from_prompt(record["prompt"], record["subject"], occurrence=0)
    except ValueError as error:
        raise ValueError(f"{where} (known_id {record['known_id']}): {error}") from error
    return KnownFact(record["known_id"], replace(fact, attribute=record["attribute"]))
