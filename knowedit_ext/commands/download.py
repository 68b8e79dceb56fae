"""`knowedit download`: published data files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .names import FILE_NAMES
from .options import folder_to_fill
from .running import say


def download(
    name: Annotated[str, typer.Argument(help=f"{', '.join(FILE_NAMES)}.")],
    folder: Annotated[Path | None, folder_to_fill("Where it goes; default: the cache.")] = None,
) -> dict[str, Any]:
    """Fetch a published data file, check it, and say where it is."""
    if name not in FILE_NAMES:
        raise ValueError(f"unknown file '{name}': expected one of {', '.join(FILE_NAMES)}")
    from ..datasets import download as fetch

    path = fetch(name, folder)
    say(path)
    return {"file": path}
