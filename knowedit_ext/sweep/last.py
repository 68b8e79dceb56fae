"""In the last layer nobody reads most rows any more: of these the keys and values are computed, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .layout import Layout, RestoreRows

WORTH = 2  # rows for each that is read, from which on it pays to project its keys and values twice


def read_alone(layout: Layout, read: torch.Tensor) -> tuple[Layout, torch.Tensor]:
    """A layout whose last layer computes what is read alone (`Layout.last`), and where it is read there.

    read: int64, rows behind the last layer. What they are copied or restored from is computed, too.
    """
    end, entering = len(layout.rows) - 1, layout.rows[-2]
    needed = torch.zeros(layout.rows[-1], dtype=torch.bool)
    needed[read] = needed[entering:] = True
    needed[layout.births[end]] = True
    behind = [key for key in layout.restores if key[1] == end or (key[1] == end - 1 and key[0] != "input")]
    within = [one for key in behind for one in layout.restores[key] if one.tensor is None]
    before = -1
    while (count := int(needed.sum())) > before:  # a source may be restored itself
        before = count
        for one in within:
            needed[one.source_rows[needed[one.rows]]] = True
    rows = needed[:entering].nonzero()[:, 0]
    if WORTH * len(rows) > entering:
        return layout, read
    place = needed.cumsum(0) - 1
    few = replace(
        layout,
        rows=[*layout.rows[:-1], int(needed.sum())],
        births=[*layout.births[:-1], place[layout.births[end]]],
        segments=[*layout.segments[:-1], of_rows(layout.segments[-1], rows)],
        restores=layout.restores | {key: _of(layout.restores[key], needed, place) for key in behind},
        last=rows,
    )
    return few, place[read]


def _of(restores: Sequence[RestoreRows], needed: torch.Tensor, place: torch.Tensor) -> list[RestoreRows]:
    """Restores of the rows that are needed, by their new places."""
    few = []
    for one in restores:
        kept = needed[one.rows]
        if kept.any():
            source = one.source_rows[kept]
            source = source if one.tensor is not None else place[source]
            few.append(replace(one, rows=place[one.rows[kept]], source_rows=source))
    return few


def of_rows(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A table whose queries are some rows of another one's, in this order; what they see stays."""
    asking = (table[:, 0] >= 0).nonzero()[:, 0]
    first, length = table[asking, 0].long(), table[asking, 3].long()
    line = torch.full((int((first + length).max()),), -1)
    ends = length.cumsum(0)
    every = torch.arange(int(ends[-1])) + (first - ends + length).repeat_interleave(length)
    line[every] = asking.repeat_interleave(length)
    whole = line[rows]
    step = rows - table[whole, 0]
    own = [torch.arange(len(rows)), table[whole, 1] + step, table[whole, 2] + step, torch.ones(len(rows)), whole]
    views = table.clone()
    views[:, 0] = -1
    return torch.cat([views, torch.stack([x.to(torch.int32) for x in own], dim=1)])
