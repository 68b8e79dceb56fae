"""The cells of a study (method, n, seed), each computed once and kept; one folder, any number of processes.

Every process takes a cell that no other is at work on. What a cell has half done stands in a folder of its own, from
which whoever takes it next goes on.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs.files import file_name, load_json, write_json
from ..runs.lock import Busy, alone
from ..runs.settings import NAME, check_same

logger = logging.getLogger(__name__)

_PATIENCE = 60.0  # seconds for what another process does in no time


@dataclass(frozen=True)
class Cell:
    """label: of its method and parameters. settings: all that its result depends on beside the study's own (JSON)."""

    label: str
    n: int
    seed: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """For files."""
        return file_name(re.sub(r"[^\w.+=-]", "_", f"{self.label}-n{self.n}-seed{self.seed}"), "the method")


# (cell, its folder) -> its result (JSON); it keeps in the folder what it can go on from
Compute = Callable[[Cell, Path], dict[str, Any]]


def run_cells(
    out: str | Path,
    study: Mapping[str, Any],
    cells: Sequence[Cell],
    compute: Compute,
    finish: Callable[[list[tuple[Cell, dict[str, Any]]]], None],
) -> list[tuple[Cell, dict[str, Any]]]:
    """The cells with their results, less those that another process is at work on.

    out: folder; `settings.json`, and of each cell `cells/NAME/result.json` beside what it goes on from. study: settings
    of all cells. More cells may be asked for later. finish: writes tables of the cells there are; called after each.

    Raises ValueError for a folder, or a cell in it, that was made with other settings, and under `torchrun`.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a study does not run under torchrun: start the same command several times, they share cells")
    out = Path(out)
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        raise ValueError(f"two cells of the study are called '{max(names, key=names.count)}'")
    with alone(out, patience=_PATIENCE):
        _same_settings(out, study)
        for cell in cells:
            _result(out, cell)  # damaged or foreign ones are told before hours are spent on the others
    for cell in cells:
        folder = out / "cells" / cell.name
        try:
            with alone(folder):
                if _result(out, cell) is None:
                    _same_settings(folder, cell.settings)
                    write_json(_path(out, cell), compute(cell, folder), sealed=True)
        except Busy:
            logger.info("another process is at work on %s", cell.name)
            continue
        with alone(out, patience=_PATIENCE):
            finish(_there(out, cells))
    return _there(out, cells)


def _same_settings(folder: Path, asked: Mapping[str, Any]) -> None:
    path = folder / NAME
    if path.exists():
        check_same(folder, load_json(path), asked, adopted=("model.name",))
    else:
        write_json(path, dict(asked))


def _path(out: Path, cell: Cell) -> Path:
    return out / "cells" / cell.name / "result.json"


def _result(out: Path, cell: Cell) -> dict[str, Any] | None:
    path = _path(out, cell)
    if not path.exists():
        return None
    check_same(path.parent, load_json(path.parent / NAME), cell.settings)
    return load_json(path, sealed=True)


def _there(out: Path, cells: Sequence[Cell]) -> list[tuple[Cell, dict[str, Any]]]:
    results = [(cell, _result(out, cell)) for cell in cells]
    return [(cell, result) for cell, result in results if result is not None]
