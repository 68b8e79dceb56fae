"""The settings that a folder of results was made with, so that work is only gone on with under the same ones."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .files import write_json


def settle(folder: str | Path, asked: dict[str, Any], by: str, adopted: Collection[str] = ()) -> dict[str, Any]:
    """Write `asked` to the folder's settings.json; or return what stands there, which must be the same.

    adopted: settings that were chosen by the machine then (memory that was free, say): those found are gone on with.
    Raises ValueError for a folder that was made with other settings, or not by `by`.
    """
    path = Path(folder) / "settings.json"
    if not path.exists():
        write_json(path, asked)
        return asked
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is not JSON ({error}): the folder was not made by {by}") from error
    asked = {**asked, **{key: found.get(key) for key in adopted}}
    plain = json.loads(json.dumps(asked))
    differing = [key for key in plain if found.get(key) != plain[key]]
    if differing:
        shown = "; ".join(f"{k}: {_short(found.get(k))} there, {_short(plain[k])} asked" for k in differing)
        raise ValueError(f"'{folder}' holds results made with other settings ({shown}): choose another folder")
    return asked


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
