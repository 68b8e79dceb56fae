"""From a segment tree of templates to row numbers: what the engine and the ops read.

Rows are numbered in order of birth, so the rows alive in layer l are a prefix of the packed matrix. The copies of a
stretch (noise samples) lie one behind the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .template import Entry, Piece, Restore, Stretch, Template


@dataclass(frozen=True)
class RestoreRows:
    """Rows to overwrite (or add to): from other rows of the same matrix, or from the rows of a tensor."""

    rows: torch.Tensor  # int64 [m]
    source_rows: torch.Tensor  # int64 [m]
    tensor: torch.Tensor | None  # [copies or 1, hidden]; None: rows of the packed matrix itself
    add: bool

    def on(self, device: torch.device) -> RestoreRows:
        tensor = None if self.tensor is None else self.tensor.to(device)
        return RestoreRows(self.rows.to(device), self.source_rows.to(device), tensor, self.add)


@dataclass(frozen=True)
class Layout:
    """Everything about a sweep that does not depend on numbers in the model.

    rows: [L + 1] rows alive in each layer, and behind the last; position, prompt: int64 [rows[L]] of each row;
    origin: int64 [rows[L]], the root's row that a row is a copy of (itself, of a root's); empty unless asked for;
    births: [L + 1] int64 gather indices of the rows born at the input of each layer;
    segments: [L] int32 [n, 5] tables for `tree_attention`, one tensor for layers in which nothing changes; nearest: by
    layer, see `Attending`;
    restores: by (site, layer), in order;
    readout: for every run int64 [copies, positions]; row_layers: rows computed, summed over layers.
    last: int64, those of the rows entering the last layer whose outputs are computed there, and none else behind it
    (`last.read_alone`); None: all.
    """

    rows: list[int]
    root_rows: int
    position: torch.Tensor
    prompt: torch.Tensor
    origin: torch.Tensor
    births: list[torch.Tensor]
    segments: list[torch.Tensor]
    nearest: dict[int, int]
    restores: dict[tuple[str, int], list[RestoreRows]]
    readout: list[np.ndarray]
    last: torch.Tensor | None = None

    @property
    def row_layers(self) -> int:
        return sum(self.rows[:-1])

    @property
    def computed(self) -> list[int]:
        """[L] rows whose outputs each layer computes."""
        return self.rows[:-1] if self.last is None else [*self.rows[:-2], len(self.last)]

    def on(self, devices: Sequence[torch.device]) -> Layout:
        """What the layers read, where each computes: one device a layer."""
        last = len(devices) - 1
        return replace(
            self,
            births=[rows.to(devices[min(layer, last)]) for layer, rows in enumerate(self.births)],
            segments=on_devices(self.segments, devices),
            restores={
                (site, layer): [one.on(devices[min(layer, last)]) for one in some]
                for (site, layer), some in self.restores.items()
            },
            last=None if self.last is None else self.last.to(devices[-1]),
        )


def on_devices(tables: Sequence[torch.Tensor], devices: Sequence[torch.device]) -> list[torch.Tensor]:
    """Each on its device; what is one tensor stays one there."""
    pairs = {(id(table), device): (table, device) for table, device in zip(tables, devices, strict=True)}
    moved = {key: table.to(device) for key, (table, device) in pairs.items()}
    return [moved[id(table), device] for table, device in zip(tables, devices, strict=True)]


def lay_out(template: Template, num_layers: int, origins: bool = False) -> Layout:
    """Number the rows of a template and expand it over the copies. origins: whether `Layout.origin` is wanted."""
    born, rows, count = [], [], 0
    for layer in range(-1, num_layers + 1):
        for stretch in template.roots if layer < 0 else template.births.get(layer, ()):
            stretch.row = count
            count += (stretch.stop - stretch.start) * stretch.copies
            born.append(stretch)
        if layer < 0:
            root_rows = count
        else:
            rows.append(count)
    lengths = np.array([stretch.stop - stretch.start for stretch in born])
    copies = np.array([stretch.copies for stretch in born])
    starts = np.array([stretch.start for stretch in born])
    prompts = np.array([stretch.prompt for stretch in born])
    return Layout(
        rows=rows,
        root_rows=root_rows,
        position=torch.from_numpy(_ranges(np.repeat(starts, copies), np.repeat(lengths, copies))),
        prompt=torch.from_numpy(np.repeat(prompts, lengths * copies)),
        origin=torch.cat([torch.arange(root_rows), _sources(born[len(template.roots) :], origins=True)])
        if origins
        else torch.empty(0, dtype=torch.int64),
        births=[_sources(template.births.get(layer, ())) for layer in range(num_layers + 1)],
        segments=_tables(template.entries, num_layers),
        nearest=template.nearest,
        restores={key: _restores(restores) for key, restores in template.restores.items()},
        readout=_read_out(template),
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[starts[0], starts[0] + 1, ..., starts[1], ...]: of each as many as its length."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


def _places(pieces: Iterable[Piece]) -> list[tuple[int, int]]:
    """Each one's first row in the first copy, and how many rows on the next copy's is; a lone row serves all copies."""
    return [
        (stretch.row + start - stretch.start, stretch.stop - stretch.start if stretch.copies > 1 else 0)
        for stretch, start, _ in pieces
    ]


def _read_out(template: Template) -> list[np.ndarray]:
    """For every run the rows where it is read, [copies, positions]."""
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for run, (pieces, copies) in enumerate(zip(template.readout, template.copies, strict=True)):
        alike[copies, len(pieces)].append(run)
    readout: list[np.ndarray] = [np.empty(0, np.int64)] * len(template.readout)
    for (copies, _), runs in alike.items():
        places = np.array([_places(template.readout[run]) for run in runs])
        start, stride = places[:, None, :, 0], places[:, None, :, 1]
        for run, rows in zip(runs, start + stride * np.arange(copies)[:, None], strict=True):
            readout[run] = rows
    return readout


def _sources(born: Iterable[Stretch], origins: bool = False) -> torch.Tensor:
    """The rows that those of some stretches are copies of; origins: of their roots'."""
    parts = [(0, 0, 0, 0)]  # first row, rows to the next copy's, copies, length
    for stretch in born:
        sources = stretch.origin if origins else stretch.sources
        lengths = [piece.stop - piece.start for piece in sources]
        pieces = [(*at, length) for at, length in zip(_places(sources), lengths, strict=True)]
        if len(pieces) == 1:
            start, stride, length = pieces[0]
            parts.append((start, stride, stretch.copies, length))
        else:  # the pieces of a copy lie beside each other
            copies = range(stretch.copies)
            parts += [(start + stride * n, 0, 1, length) for n in copies for start, stride, length in pieces]
    copies = np.array(parts)[:, 2]
    start, stride, _, length = np.repeat(parts, copies, 0).T
    return torch.from_numpy(_ranges(start + stride * _ranges(np.zeros_like(copies), copies), length))


def _restores(restores: Sequence[Restore]) -> list[RestoreRows]:
    """Batches of restores; a row that is restored twice is in two batches, in order."""
    batches: list[tuple[bool, torch.Tensor | None, list[Restore]]] = []
    held: set[tuple[int, int]] = set()  # what the last batch restores
    for restore in restores:
        tensor = restore.source if isinstance(restore.source, torch.Tensor) else None
        target = (id(restore.target.stretch), restore.target.start)
        last = batches[-1] if batches else None
        if last is not None and last[0] == restore.add and last[1] is tensor is None and target not in held:
            last[2].append(restore)
        else:
            batches.append((restore.add, tensor, [restore]))
            held = set()
        held.add(target)
    return [_batch(add, tensor, some) for add, tensor, some in batches]


def _batch(add: bool, tensor: torch.Tensor | None, restores: Sequence[Restore]) -> RestoreRows:
    copies = np.array([restore.target.stretch.copies for restore in restores])
    number = _ranges(np.zeros_like(copies), copies)  # of the copy

    def rows(pieces: Iterable[Piece]) -> torch.Tensor:
        start, stride = np.array(_places(pieces)).T
        return torch.from_numpy(np.repeat(start, copies) + np.repeat(stride, copies) * number)

    if tensor is None:
        sources = rows(restore.source for restore in restores)
    else:
        tensor = torch.atleast_2d(tensor)
        sources = torch.from_numpy(number if len(tensor) > 1 else np.zeros_like(number))
    return RestoreRows(rows(restore.target for restore in restores), sources, tensor, add)


def _tables(entries: list[Entry], num_layers: int) -> list[torch.Tensor]:
    """One table a layer. Lines are in order of birth, so tables grow at the end (what a line sees may change)."""
    entries = sorted((e for e in entries if e.since < num_layers), key=lambda e: e.since)  # stable
    line: dict[int, int] = {}
    changes: dict[int, list[tuple[int, int, int, int, int, int]]] = defaultdict(list)
    until, count = [0] * num_layers, 0
    for entry in entries:
        line[id(entry)] = count
        count += entry.copies
        until[entry.since] = count
    for entry in entries:
        at = line[id(entry)]
        for layer, parent, keys in entry.sights:
            if layer >= num_layers:
                break
            above = (-1, 0) if parent is None else (line[id(parent)], int(parent.copies > 1))
            changes[layer].append((at, entry.copies, *_places([keys])[0], *above))
    copies = np.array([entry.copies for entry in entries])
    number = _ranges(np.zeros_like(copies), copies)
    fixed = [(e.query, e.piece.start, e.piece.stop - e.piece.start) for e in entries]
    fixed = np.hstack([_places(e.piece for e in entries), fixed])
    row, stride, query, position, length = np.repeat(fixed, copies, 0).T
    table = np.empty((count, 5), dtype=np.int32)
    table[:, 0] = np.where(query, row + stride * number, -1)
    table[:, 2], table[:, 3] = position, length
    tables, end = [], 0
    for layer in range(num_layers):
        if changes[layer]:
            changed = np.array(changes[layer])
            at, key, key_stride, parent, parent_stride = np.repeat(changed[:, [0, 2, 3, 4, 5]], changed[:, 1], 0).T
            number = _ranges(np.zeros(len(changed), np.int64), changed[:, 1])
            table[at + number, 1] = key + key_stride * number
            table[at + number, 4] = parent + parent_stride * number
        new = changes[layer] or until[layer] > end
        end = max(end, until[layer])
        tables.append(torch.from_numpy(table[:end].copy()) if new else tables[-1])
    return tables
