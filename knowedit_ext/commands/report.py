"""`knowedit report`: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import knowedit_ext as ke

from .options import file_to_write
from .running import say


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders made by `knowedit evaluate`, or published case files.")
    ],
    out: Annotated[Path | None, file_to_write("Where the Markdown table goes; default: the terminal.")] = None,
) -> dict[str, Any]:
    """Runs side by side, in the papers' column order."""
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    reports = {name: ke.Report.load(folder) for name, folder in zip(names, folders, strict=True)}
    from ..evaluation.report import side_by_side
    from ..runs.files import atomic_write

    text = side_by_side(reports)
    if out is None:
        say(text)
    else:
        atomic_write(out, lambda file: file.write(text.encode()))
        say(out)
    return {name: report.to_dict() for name, report in reports.items()}
