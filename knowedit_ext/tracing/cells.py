"""The cells of a trace as runs of a sweep, which depend on how long a prompt is and on nothing that it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..sweep import Interventions, Patch
from .kinds import KINDS, window_layers

KEPT = 8  # shapes whose runs and plans are kept: of GPT-2 XL's three maps some 20 MB each


@dataclass(frozen=True)
class Shape:
    """All that the runs of a fact depend on.

    layers: the model's; tokens: of the clean run, the answer's but its last included; first: that is corrupted;
    copies: noise samples; readout: positions; cells: tokens; window, sever: see `TraceSettings`; second: are severed
    outputs from a draw of their own; low: has the lowest score one?
    """

    layers: int
    tokens: int
    first: int
    copies: int
    readout: range
    cells: tuple[int, ...]
    window: int
    sever: str | None
    second: bool
    low: bool


@dataclass(frozen=True)
class Cells:
    """Numbers of the runs of a fact: clean, corrupted for the lowest score and for the cells, and of each kind the
    cells', by (token, layer)."""

    high: int
    low: int
    base: int
    by_kind: Mapping[str, Mapping[tuple[int, int], int]]

    def all_runs(self) -> list[int]:
        return [self.high, self.low, self.base, *(run for cells in self.by_kind.values() for run in cells.values())]


@lru_cache(maxsize=KEPT)
def all_cells(shapes: tuple[Shape, ...], kinds: tuple[str, ...]) -> tuple[Interventions, list[Cells]]:
    """Every cell of facts of these shapes, in one sweep."""
    interventions = Interventions()
    return interventions, [add_cells(interventions, n, shape, kinds) for n, shape in enumerate(shapes)]


def add_cells(
    interventions: Interventions,
    prompt: int,
    shape: Shape,
    kinds: Sequence[str],
    only: Mapping[str, Sequence[tuple[int, int]]] | None = None,
) -> Cells:
    """Roots in the order of `FactPlan.hidden`. only: of each kind the cells (token, layer); None: all."""
    clean = interventions.add_root(shape.tokens, prompt=prompt)
    branch = dict(copies=shape.copies, start=shape.first, parent=clean if shape.first else None)
    corrupted = frozen = low = interventions.add_root(shape.tokens, prompt=prompt, **branch)
    if shape.second:
        corrupted = interventions.add_root(shape.tokens, prompt=prompt, **branch)
    if shape.low:
        low = interventions.add_root(shape.tokens, prompt=prompt, **branch)
    add = lambda root, patches=(): interventions.add_run(root, patches, shape.readout)  # noqa: E731
    high_run, low_run = add(clean), add(low)
    base_run = low_run if low == corrupted else add(corrupted)
    every = [(token, layer) for token in shape.cells for layer in range(shape.layers)]
    by_kind: dict[str, dict[tuple[int, int], int]] = {}
    for kind in kinds:
        by_kind[kind] = cells = {}
        for token, layer in every if only is None else only[kind]:
            if token < shape.first:  # left of the noise all runs are equal
                cells[token, layer] = base_run
            else:
                cells[token, layer] = add(corrupted, _patches(shape, kind, token, layer, clean, frozen))
    return Cells(high_run, low_run, base_run, by_kind)


def _patches(shape: Shape, kind: str, token: int, layer: int, clean: int, frozen: int) -> list[Patch]:
    row = KINDS[kind]
    restored = window_layers(layer, shape.window, shape.layers) if row.windowed else (layer,)
    patches = [Patch(row.site, restored, (token,), clean)]
    if shape.sever is not None:
        patches.append(Patch(shape.sever, tuple(range(shape.layers)), (token,), frozen))
    return patches
