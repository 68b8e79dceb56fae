"""The cells of a study, each computed once and kept; one folder, any number of processes.

Every process takes a cell that no other is at work on. What a cell has half done stands in a folder of its own, from
which whoever takes it next goes on.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..runs.files import file_name, load_json, write_json
from ..runs.lock import Busy, alone
from ..runs.ranks import Ranks, by_itself
from ..runs.settings import NAME, check_same

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds for what another process does in no time


@dataclass(frozen=True)
class Cell:
    """key: what tells it from the study's others, e.g. {"method": "memit", "n": 10, "seed": 0}; names its folder.
    settings: all that its result depends on beside the study's own (JSON)."""

    key: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """For files: "memit-n10-seed0"."""
        parts = [str(value) if isinstance(value, str) else f"{name}{value}" for name, value in self.key.items()]
        return file_name(re.sub(r"[^\w.+=-]", "_", "-".join(parts)), "the cell")


# (cell, its folder) -> its result (JSON); it keeps in the folder what it can go on from
Compute = Callable[[Cell, Path], dict[str, Any]]
Results = list[tuple[Cell, dict[str, Any]]]


def run_cells(
    out: str | Path,
    study: Mapping[str, Any],
    cells: Sequence[Cell],
    compute: Compute,
    finish: Callable[[Results], None] | None = None,
    *,
    needed: bool = False,
    progress: str | None = None,
) -> Results:
    """The cells with their results, less those that another process is at work on.

    out: folder; `settings.json`, and of each cell `cells/NAME/result.json` beside what it goes on from. study: settings
    of all cells. More cells may be asked for later. finish: writes tables of the cells there are; called after each.
    needed: all of them are: wait for those of other processes. progress: what a bar calls the work.

    Under `torchrun` the ranks share the cells, and all return all of them. Raises ValueError for a folder, or a cell in
    it, that was made with other settings.
    """
    out, ranks = Path(out), Ranks()
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        raise ValueError(f"two cells of the study are called '{max(names, key=names.count)}'")
    with by_itself():  # what a cell calls is the work of one process
        with alone(out, patience=PATIENCE):
            if not (out / NAME).exists() and any(out.glob("cells/*/*.json")):
                raise ValueError(f"'{out}' has cells, but no {NAME} to tell what they are of: choose another folder")
            _same_settings(out, study)
        found: dict[str, dict[str, Any]] = {}
        _look_for(out, cells, found)  # damaged or foreign ones are told before hours are spent on the others
        first = len(cells) * ranks.rank // ranks.size
        order = (*cells[first:], *cells[:first])
        for cell in tqdm(order, desc=progress, unit="cell", disable=progress is None):
            if cell.name in found:
                continue
            try:
                found[cell.name] = _computed(out, cell, compute, 0.0)
            except Busy:
                logger.info("another process is at work on %s", cell.name)
                continue
            _finish(out, cells, found, finish)
        for cell in cells if needed else ():
            if cell.name not in found:
                found[cell.name] = _computed(out, cell, compute, math.inf)
        _finish(out, cells, found, finish)  # who was killed may have left its last cell out of the tables
    ranks.wait()
    return _look_for(out, cells, found)


def _finish(
    out: Path, cells: Sequence[Cell], found: dict[str, dict[str, Any]], finish: Callable[[Results], None] | None
) -> None:
    if finish is not None:
        with alone(out, patience=PATIENCE):
            if results := _look_for(out, cells, found):
                finish(results)


def _computed(out: Path, cell: Cell, compute: Compute, patience: float) -> dict[str, Any]:
    folder = out / "cells" / cell.name
    with alone(folder, patience=patience):
        there = _result(out, cell)
        if there is None:
            _same_settings(folder, cell.settings)
            write_json(_path(out, cell), compute(cell, folder), sealed=True)
            there = _result(out, cell)
        return there


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


def _look_for(out: Path, cells: Sequence[Cell], found: dict[str, dict[str, Any]]) -> Results:
    """Those there are, in order; read once."""
    for cell in cells:
        if cell.name not in found and (result := _result(out, cell)) is not None:
            found[cell.name] = result
    return [(cell, found[cell.name]) for cell in cells if cell.name in found]
