"""Attribute snippets: texts about things that have a property, which the texts of an edited model are compared with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from .records import BadRecord, Problem, Record, Records, brief, read_json, read_records, settle, take, take_text

Snippets = dict[str, dict[str, list[dict[str, str]]]]  # relation id -> target id -> [{name, text}]
Pairs = Collection[tuple[str, str]]  # (relation id, target id)


def load_snippets(source: str | Path | Iterable[Mapping[str, Any]], *, only: Pairs | None = None) -> Snippets:
    """Snippets by relation id and target id, from attribute_snippets.json or from its entries in memory.

    source: entries {relation_id, target_id, samples: [{name, text}, ...]}; those of one pair are joined, as published.
    only: keep these (relation id, target id) pairs. The published file (926 MB) is read as a whole: about 2 GB of
        memory while it is read with few pairs, 2.5 GB with all of them, of which 1 GB stays.
        `wanted_snippets(records)` names those that some records need.

    Raises ValueError that names the entry, the key and what is wrong.
    """
    if isinstance(source, (str, Path)):
        name, entries = f"'{source}'", _read(Path(source), only)
    else:
        name, entries = "the snippets given", read_records(source, "snippets")
    snippets: Snippets = {}
    for number, entry in enumerate(entries):
        try:
            relation, target, samples = _entry(entry)
        except Problem as problem:
            raise ValueError(f"{name}: {BadRecord(number, None, problem.key, problem.reason)}") from None
        if only is None or (relation, target) in only:
            snippets.setdefault(relation, {}).setdefault(target, []).extend(samples)
    return snippets


def wanted_snippets(records: Iterable[Record]) -> set[tuple[str, str]]:
    """The (relation id, id of the new target) pairs of CounterFact records that have both."""
    pairs = map(_pair, records)
    return {(relation, target) for relation, target in pairs if relation is not None and target is not None}


def snippets_for(snippets: Snippets, record: Record) -> list[dict[str, str]]:
    """The texts about things that have the record's new target. ValueError names relation and target without any."""
    try:
        return _find(snippets, record)
    except Problem as problem:
        raise ValueError(f"record with case_id {record['case_id']}: {problem.reason}") from None


def with_snippets(records: Iterable[Record], snippets: Snippets, *, skip_bad: bool = False) -> Records:
    """The records that have snippets. ValueError names those without, which `skip_bad` adds to `.bad` instead.

    Those already in `records.bad` stay there; an index of a new one is its place in `records`.
    """
    complete, lacking = Records(), []
    for index, record in enumerate(records):
        try:
            _find(snippets, record)
            complete.append(record)
        except Problem as problem:
            lacking.append(BadRecord(index, record["case_id"], problem.key, problem.reason))
    complete.bad = lacking
    settle(complete, "snippets", skip_bad)
    complete.bad = [*getattr(records, "bad", ()), *lacking]
    return complete


def _pair(record: Record) -> tuple[str | None, str | None]:
    rewrite = record["requested_rewrite"]
    return rewrite.get("relation_id"), rewrite["target_new"].get("id")


def _find(snippets: Snippets, record: Record) -> list[dict[str, str]]:
    relation, target = _pair(record)
    if relation is None or target is None:
        key = "relation_id" if relation is None else "target_new.id"
        raise Problem(f"requested_rewrite.{key}", "is unknown, so its snippets cannot be found")
    texts = snippets.get(relation, {}).get(target)
    if not texts:
        new = record["requested_rewrite"]["target_new"]["str"]
        reason = f"is {target} ('{new}'): no snippets for relation {relation} and target {target}"
        raise Problem("requested_rewrite.target_new.id", reason)
    return texts


def _read(path: Path, only: Pairs | None) -> list[Any]:
    if only is None:
        return read_json(path, list, "a list of entries")
    wanted = frozenset(only)

    def drop(entry: dict[str, Any]) -> dict[str, Any]:  # at once, so that what is not kept does not fill the memory
        pair = (entry.get("relation_id"), entry.get("target_id"))
        others = "samples" in entry and all(isinstance(part, str) for part in pair) and pair not in wanted
        return {**entry, "samples": []} if others else entry

    return read_json(path, list, "a list of entries", keep=drop)


def _entry(entry: Any) -> tuple[str, str, list[dict[str, str]]]:
    if not isinstance(entry, Mapping):
        raise Problem("", f"is a {type(entry).__name__}, expected an object")
    relation, target = take_text(entry, "relation_id"), take_text(entry, "target_id")
    samples = take(entry, "samples")
    if not isinstance(samples, list):
        raise Problem("samples", f"is {brief(samples)}, expected a list of names with texts")
    for number, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            raise Problem(f"samples[{number}]", f"is {brief(sample)}, expected an object with a name and a text")
        for key in ("name", "text"):
            if not isinstance(take(sample, key, f"samples[{number}]."), str):
                raise Problem(f"samples[{number}].{key}", f"is {brief(sample[key])}, expected text")
    return relation, target, samples
