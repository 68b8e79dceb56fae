"""`knowedit compare`: two traces, or two evaluations of the same records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import knowedit_ext as ke

from .options import figure_to_write
from .running import say

Compared = Annotated[Path, typer.Argument(help="A saved trace (.npz), or a folder of `knowedit evaluate`.")]


def compare(
    first: Compared,
    second: Compared,
    plot: Annotated[Path | None, figure_to_write("Of two traces: second less first, as a heat map.")] = None,
) -> dict[str, Any]:
    """Two traces of one prompt, cell by cell; or two runs, record by record, with paired intervals."""
    for path in (first, second):
        if not path.exists():
            raise ValueError(f"there is no file or folder '{path}'")
    if first.is_dir() != second.is_dir():
        raise ValueError(f"'{first}' and '{second}' are a file and a folder: expected two traces, or two runs")
    if first.is_dir():
        if plot is not None:
            raise ValueError("--plot is of two traces")
        return _runs(first, second)
    from ..tracing.compare import difference

    found = difference(ke.Trace.load(first), ke.Trace.load(second))
    say(found.table())
    if plot is not None:
        found.plot(plot)
        say(plot)
    return found.to_dict()


def _runs(first: Path, second: Path) -> dict[str, Any]:
    from ..evaluation.compare import paired, paired_table

    rows = paired(ke.Report.load(first), ke.Report.load(second))
    say(paired_table(rows, str(first), str(second)))
    return {"first": first, "second": second, "columns": rows}
