"""What the planner finds: pieces of runs that layers compute, where their rows come from, and what attends to what.

A template stands for all copies of a root at once; `layout.py` numbers the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

ROOT_BIRTH = -1  # root rows are there before layer 0


@dataclass(eq=False, slots=True)
class Stretch:
    """Rows start..stop of a run, [copies, stop - start] of them, that first enter layer `birth`; `row` numbers the
    first, once they are laid out. origin: the root's own rows at these positions."""

    start: int
    stop: int
    copies: int
    birth: int
    prompt: int
    sources: list[Piece] = field(default_factory=list)  # what the rows are copies of, in order of position
    origin: list[Piece] = field(default_factory=list)
    entry: Entry | None = None
    row: int = -1


class Piece(NamedTuple):
    """Positions start..stop of a stretch."""

    stretch: Stretch
    start: int
    stop: int


@dataclass(eq=False, slots=True)
class Entry:
    """A line of the attention table: a stretch with its queries, or a view of somebody's rows without."""

    piece: Piece
    copies: int
    query: bool
    since: int  # first layer whose table has it
    # (from layer on, parent, its own keys: the piece's, but for a token that does not see itself)
    sights: list[tuple[int, Entry | None, Piece]] = field(default_factory=list)

    def see(self, layer: int, parent: Entry | None, keys: Piece | None = None) -> None:
        """From `layer` on it sees its own `keys` and, through its parent, what lies left of them."""
        keys = keys or self.piece
        if not self.sights or self.sights[-1][1:] != (parent, keys):
            self.sights.append((layer, parent, keys))


class Restore(NamedTuple):
    """Overwrite (or add to) one position of a stretch with a root's row or a tensor [copies or 1, hidden]."""

    target: Piece
    source: Piece | torch.Tensor
    add: bool


@dataclass(slots=True)
class Template:
    """What the planner found: births and restores by layer, attention entries, and where each run is read out."""

    roots: list[Stretch]
    births: dict[int, list[Stretch]]
    restores: dict[tuple[str, int], list[Restore]]  # site "input" | "attn" | "mlp" | "layer"
    entries: list[Entry]
    readout: list[list[Piece]]  # a run's pieces, one a readout position
    copies: list[int]  # a run's copies
    nearest: dict[int, int]  # by layer: how far a token that does not see itself has to look
