"""Known facts (known_1000.json of rome): what causal tracing runs over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from ..model.facts import Fact
from ..model.spelling import mark_subject, marked_occurrence
from .records import is_number, read_records

REQUIRED = ("known_id", "prompt", "subject", "attribute")
SHAPE = '{"prompt": "{} plays the", "subject": "Miles Davis", "attribute": "trumpet"}'


@dataclass(frozen=True)
class KnownFact:
    """A fact with the number that names its files."""

    known_id: int
    fact: Fact


def load_known(source: str | Path | Iterable[Fact | Mapping[str, Any] | KnownFact]) -> list[KnownFact]:
    """Facts from a JSON file in the known_1000 format, from its records, or from `Fact`s (numbered in order).

    A record is {known_id, prompt, subject, attribute, ...}; where none has a known_id they are numbered in order. The
    prompt has a `{}` for its subject, or spells it out: of several occurrences the first is meant, as published, but
    whole words go before parts of longer ones. Raises ValueError that names the record and the key that is wrong.
    """
    name = f"'{source}'" if isinstance(source, (str, Path)) else "the facts given"
    records = list(read_records(source, "facts"))
    if not any(isinstance(record, Mapping) and "known_id" in record for record in records):
        records = [{**r, "known_id": n} if isinstance(r, Mapping) else r for n, r in enumerate(records)]
    facts = [_known(record, number, name) for number, record in enumerate(records)]
    if not facts:
        raise ValueError(f"{name}: no facts")
    seen: dict[int, int] = {}
    for number, known in enumerate(facts):
        if known.known_id in seen:
            raise ValueError(
                f"records {seen[known.known_id]} and {number} of {name} have the same known_id {known.known_id}"
            )
        seen[known.known_id] = number
    return facts


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
            told = "which others have" if key == "known_id" else f"a fact is {SHAPE}"
            raise ValueError(f"{where} lacks '{key}': {told}")
        right = is_number(record[key]) if key == "known_id" else isinstance(record[key], str)
        if not right:
            wanted = "a number" if key == "known_id" else "text"
            raise ValueError(f"{where}: '{key}' is {brief(record[key])}, expected {wanted}")
    prompt, subject = record["prompt"], record["subject"]
    try:
        if "{}" not in prompt and prompt.strip() and subject.strip():
            prompt = mark_subject(prompt, subject, first=True)
        several = "{}" in prompt and prompt.replace("{}", subject).count(subject) > 1
        occurrence = marked_occurrence(prompt, subject) if several else None
        fact = Fact(prompt, subject, attribute=record["attribute"], occurrence=occurrence)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} (known_id {record['known_id']}): {error}") from error
    return KnownFact(record["known_id"], fact)
