"""Case files in the published layout: looked at key by key before they are averaged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from ..runs.files import load_json
from .metric import number
from .scores import values_of

WHEN = {"pre": "unedited", "post": "edited"}


def read_cases(folder: Path) -> list[dict[str, Any]]:
    """The cases of `cases/*.json`, or of the published layout's *case_*.json in the folder itself, by number.

    ValueError names the file and the key that is missing, of another type or no finite number; and a case that two
    files are about (of two runs, say), which would be averaged twice.
    """
    files = sorted([*folder.glob("cases/*case_*.json"), *folder.glob("*case_*.json")], key=_number_of)
    if not files:
        raise ValueError(f"'{folder}' holds no cases (*case_*.json)")
    cases, seen, shared = [], {}, None
    for path in files:
        case = read_case(path)
        if (first := seen.setdefault(case["case_id"], path)) is not path:
            raise ValueError(f"'{first}' and '{path}' are both about case {case['case_id']}: of two runs?")
        if "grouped_case_ids" in case:  # thousands of cases hold the same long list of what was edited with them
            shared = shared if case["grouped_case_ids"] == shared else case["grouped_case_ids"]
            case["grouped_case_ids"] = shared
        cases.append(case)
    return cases


def read_case(path: Path) -> dict[str, Any]:
    case = load_json(path)
    try:
        _check(case)
    except ValueError as error:
        raise ValueError(f"'{path}' is no case of an evaluation: {error}") from error
    return case


def _check(case: Mapping[str, Any]) -> None:
    if isinstance(_take(case, "case_id", (int, str)), bool):
        raise ValueError(f"case_id is {case['case_id']}: expected a number")
    rewrites = _take(case, "requested_rewrite", (dict, list))
    if isinstance(rewrites, dict):
        _check_rewrite(rewrites, "requested_rewrite.")
    elif not rewrites:
        raise ValueError("requested_rewrite is []: expected dict, or a list of them")
    else:
        for n, rewrite in enumerate(rewrites):
            if not isinstance(rewrite, dict):
                raise ValueError(f"requested_rewrite[{n}] is {brief(rewrite)}: expected dict")
            _check_rewrite(rewrite, f"requested_rewrite[{n}].")
    if case.get("time") is not None:
        number(case["time"], "time")
    sides = [when for when in WHEN if when in case]
    if not sides:
        raise ValueError(f"it has neither {' nor '.join(WHEN)}")
    for when in sides:
        measured = _take(case, when, dict)
        try:
            scores = values_of(measured)
        except ValueError as error:
            raise ValueError(f"{when}.{error}") from error
        if not scores:
            raise ValueError(f"{when} holds nothing that was measured ({', '.join(measured) or 'nothing at all'})")


def _check_rewrite(rewrite: Mapping[str, Any], inside: str) -> None:
    for key in ("prompt", "subject"):
        _take(rewrite, key, str, inside)
    for key in ("target_new", *(key for key in ("target_true",) if key in rewrite)):
        _take(_take(rewrite, key, dict, inside), "str", str, f"{inside}{key}.")
    if rewrite.get("relation_id") is not None:
        _take(rewrite, "relation_id", str, inside)


def _take(values: Mapping[str, Any], key: str, kind: type | tuple[type, ...], inside: str = "") -> Any:
    if key not in values:
        raise ValueError(f"it lacks {inside}{key}")
    if not isinstance(values[key], kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{inside}{key} is {brief(values[key])}: expected {wanted}")
    return values[key]


def _number_of(path: Path) -> tuple[int, str]:
    number = path.stem.rpartition("_")[2]
    return (int(number) if number.isdecimal() else -1, path.name)
