"""What a folder's results were made with: work is gone on with under the same settings alone, or enlarged."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checksums import digest
from .files import load_json, write_json
from .ranks import Ranks

NAME = "settings.json"
_MARK = "digest "  # in front of what only says whether something is the same
_NAMED = 4  # differences that one error spells out
_ABSENT = object()


def marked(*contents: bytes | str) -> str:
    """A digest as a setting: where two differ, the error says just that."""
    return _MARK + digest(*(c.encode("utf-8", "surrogatepass") if isinstance(c, str) else c for c in contents))


@dataclass(frozen=True)
class Growth:
    """What may be more than a folder has.

    series: the setting with the list of items; it may get longer at its end. id: the key that names an item. Items are
    computed so many at a time as the setting "group" says, and what is computed depends on the group.
    sets: settings with lists of names, of which there may be more.
    """

    series: str
    id: str
    sets: Collection[str] = ()

    def groups(self, count: int, settings: Mapping[str, Any]) -> list[range]:
        """The groups of the folder's items, those that the first `count` are in.

        A run that is smaller than the folder's may end within the last: see `refuse_part`.
        """
        whole, size = len(settings[self.series]), settings["group"]
        return [range(n, min(n + size, whole)) for n in range(0, count, size)]

    def unfilled(self, settings: Mapping[str, Any]) -> list[Any]:
        """Ids of the items in a last group that is not full: what is added joins it."""
        items = settings[self.series]
        return [item[self.id] for item in items[len(items) // settings["group"] * settings["group"] :]]

    def refuse_part(self, group: range, count: int, settings: Mapping[str, Any]) -> None:
        """ValueError for a group with items that were not asked for: it can only be computed as a whole."""
        if group.stop > count:
            others = ", ".join(f"{self.id} {item[self.id]}" for item in settings[self.series][count : group.stop])
            raise ValueError(
                f"{self.id} {settings[self.series][count - 1][self.id]} is computed together with {others} in this "
                "folder: ask for these too, or choose another folder"
            )


def settle(
    folder: str | Path,
    asked: Mapping[str, Any],
    ranks: Ranks,
    *,
    adopted: Collection[str] = (),
    growth: Growth | None = None,
    enlarge: Callable[[dict[str, Any]], None] | None = None,
    hints: Mapping[str, Callable[[Any], str]] | None = None,
) -> dict[str, Any]:
    """Write `asked` to the folder's settings.json; or return what stands there, which must be the same.

    adopted: settings (dotted names) that may differ, such as what was chosen by the memory that was free then: those
        found are gone on with.
    growth: what may be more in `asked`, then what is found grows by it, or less. enlarge: called where the series is
        about to grow, with the settings found.
    hints: by dotted name what to do, given the value found, where that setting differs.

    All ranks call this, under `lock.alone`, and return the same. Raises ValueError for a folder that was made with
    other settings, which says what differs.
    """
    folder, asked = Path(folder), json.loads(json.dumps(asked))
    path = folder / NAME
    for name in growth.sets if growth else ():
        asked[name] = sorted(asked[name])
    stored = _read(folder)
    ranks.wait()  # all have read what one of them may write
    settings = asked if stored is None else _agreed(folder, stored, asked, adopted, growth, hints or {})
    if ranks.first and settings != stored:
        if enlarge is not None and stored is not None and len(stored[growth.series]) < len(settings[growth.series]):
            enlarge(stored)
        write_json(path, settings)
    ranks.wait()
    return load_json(path)


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / NAME
    if not path.exists():
        if any(folder.glob("cases/*")):
            raise ValueError(f"'{folder}' has cases, but no {NAME} to tell what they are of: choose another folder")
        return None
    try:
        return load_json(path)
    except ValueError as error:
        raise ValueError(f"'{path}' does not hold the settings of a run: choose another folder") from error


def _agreed(
    folder: Path,
    stored: dict[str, Any],
    asked: dict[str, Any],
    adopted: Collection[str],
    growth: Growth | None,
    hints: Mapping[str, Callable[[Any], str]],
) -> dict[str, Any]:
    """The stored settings, grown by what is asked; ValueError where they differ."""
    there, here, settings = dict(stored), dict(asked), dict(stored)
    if growth is not None and isinstance(stored.get(growth.series), list):
        both = sorted((stored[growth.series], asked[growth.series]), key=len)
        settings[growth.series] = both[-1]
        for each in (there, here):
            each[growth.series] = each[growth.series][: len(both[0])]
        for name in growth.sets:
            settings[name] = sorted({*stored.get(name, ()), *asked[name]})
            there[name] = here[name] = None
    check_same(folder, there, here, adopted, hints)
    return settings


def check_same(
    path: Path,
    there: Mapping[str, Any],
    asked: Mapping[str, Any],
    adopted: Collection[str] = (),
    hints: Mapping[str, Callable[[Any], str]] | None = None,
) -> None:
    """ValueError where what stands at `path` was made with other settings than asked; see `settle`."""
    for name in adopted:
        there, asked = _without(there, name), _without(asked, name)
    differences = differing(there, json.loads(json.dumps(asked)))
    if differences:
        differ = [name for name in hints or () if _at(there, name) != _at(asked, name)]
        description = spell(differences + [hints[name](_at(there, name)) for name in differ])
        raise ValueError(f"'{path}' holds results made with other settings ({description}): choose another folder")


def differing(there: Any, asked: Any, name: str = "") -> list[str]:
    """What differs between two settings, in words, an item each; empty where nothing does.

    Items of lists are named by their id, where they have one: "facts known_id 7.target: ' Rome' there, ' Oslo' asked".
    """
    if there == asked:
        return []
    if isinstance(there, Mapping) and isinstance(asked, Mapping):
        pairs = [(key, there.get(key, _ABSENT), asked.get(key, _ABSENT)) for key in {**there, **asked}]
        return [difference for key, a, b in pairs for difference in differing(a, b, f"{name}.{key}" if name else key)]
    if isinstance(there, list) and isinstance(asked, list) and any(isinstance(x, Mapping) for x in (*there, *asked)):
        return _differing_items(there, asked, name)
    if all(isinstance(value, str) and value.startswith(_MARK) for value in (there, asked)):
        return [f"other {name}"]
    return [f"{name}: {_short(there)} there, {_short(asked)} asked"]


def _differing_items(there: list[Any], asked: list[Any], name: str) -> list[str]:
    differences = []
    for number, (a, b) in enumerate(zip(there, asked, strict=False)):
        labels = _label(a), _label(b)
        if labels[0] != labels[1]:
            return [*differences, f"{name} {number}: {labels[0]} there, {labels[1]} asked"]
        differences += differing(a, b, f"{name} {labels[0] or number}")
    if len(there) != len(asked):
        differences.append(f"{name}: {len(there)} there, {len(asked)} asked")
    return differences


def _label(item: Any) -> str:
    return next((f"{k} {item[k]}" for k in ("known_id", "case_id") if isinstance(item, Mapping) and k in item), "")


def spell(differences: list[str]) -> str:
    more = [f"and {len(differences) - _NAMED} more"] if len(differences) > _NAMED else []
    return "; ".join([*differences[:_NAMED], *more])


def _at(settings: Mapping[str, Any], name: str) -> Any:
    for key in name.split("."):
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings


def _without(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    key, _, rest = name.partition(".")
    kept = {k: v for k, v in settings.items() if k != key}
    if rest and isinstance(settings.get(key), Mapping):
        kept[key] = _without(settings[key], rest)
    return kept


def _short(value: object) -> str:
    text = "nothing" if value is _ABSENT else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
