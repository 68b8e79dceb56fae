"""`knowedit report`: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import knowedit_ext as ke

from ..evaluation.report import side_by_side
from ..runs.files import atomic_write
from .options import file_to_write


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders made by `knowedit evaluate`, or published case files.")
    ],
    out: Annotated[Path | None, file_to_write("Where the Markdown table goes; default: the terminal.")] = None,
) -> None:
    """Runs side by side, in the papers' column order."""
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    text = side_by_side({name: ke.Report.load(folder) for name, folder in zip(names, folders, strict=True)})
    if out is None:
        typer.echo(text)
    else:
        atomic_write(out, lambda file: file.write(text.encode()))
        typer.echo(str(out))
