"""From a segment tree of templates to row numbers: what the engine and the ops read.

Rows are numbered in order of birth, so the rows alive in layer l are a prefix of the packed matrix. The copies of a
stretch (noise samples) lie one behind the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .segments import Entry, Piece, Template


@dataclass(frozen=True)
class RestoreRows:
    """Rows to overwrite (or add to): from other rows of the same matrix, or from the rows of a tensor."""

    rows: torch.Tensor  # int64 [m]
    source_rows: torch.Tensor  # int64 [m]
    tensor: torch.Tensor | None  # [copies or 1, hidden]; None: rows of the packed matrix itself
    add: bool


@dataclass(frozen=True)
class Layout:
    """Everything about a sweep that does not depend on numbers in the model.

    rows: [L + 1] rows alive in each layer, and behind the last; position, prompt: int64 [rows[L]] of each row;
    births: [L + 1] int64 gather indices of the rows born at the input of each layer;
    segments: [L] int32 [n, 5] tables for `tree_attention`; nearest: by layer, see `Attending`;
    restores: by (site, layer), in order;
    readout: for every run int64 [copies, positions]; row_layers: rows computed, summed over layers.
    """

    rows: list[int]
    root_rows: int
    position: torch.Tensor
    prompt: torch.Tensor
    births: list[torch.Tensor]
    segments: list[torch.Tensor]
    nearest: dict[int, int]
    restores: dict[tuple[str, int], list[RestoreRows]]
    readout: list[np.ndarray]

    @property
    def row_layers(self) -> int:
        return sum(self.rows[:-1])


def lay_out(template: Template, num_layers: int) -> Layout:
    """Number the rows of a template and expand it over the copies."""
    first: dict[int, int] = {}  # id(stretch) -> its first row
    position, prompt, rows = [], [], []
    count = 0
    births = [torch.empty(0, dtype=torch.int64)] * (num_layers + 1)
    for layer in range(-1, num_layers + 1):
        gather = []
        born = template.roots if layer < 0 else template.births.get(layer, ())
        for stretch in born:
            length = stretch.stop - stretch.start
            first[id(stretch)] = count
            count += length * stretch.copies
            position.append(np.tile(np.arange(stretch.start, stretch.stop), stretch.copies))
            prompt.append(np.full(length * stretch.copies, stretch.prompt))
            if layer >= 0:
                pieces = [_rows(piece, stretch.copies, first) for piece in stretch.sources]
                gather.append(np.concatenate(pieces, axis=1).reshape(-1) if len(pieces) > 1 else pieces[0].reshape(-1))
        if layer < 0:
            root_rows = count
            continue
        if gather:
            births[layer] = torch.from_numpy(np.concatenate(gather))
        rows.append(count)
    return Layout(
        rows=rows,
        root_rows=root_rows,
        position=torch.from_numpy(np.concatenate(position)),
        prompt=torch.from_numpy(np.concatenate(prompt)),
        births=births,
        segments=_tables(template.entries, first, num_layers),
        nearest=template.nearest,
        restores={key: _restores(restores, first) for key, restores in template.restores.items()},
        readout=[
            np.concatenate([_rows(piece, copies, first) for piece in pieces], axis=1)
            for pieces, copies in zip(template.readout, template.copies, strict=True)
        ],
    )


def _rows(piece: Piece, copies: int, first: dict[int, int]) -> np.ndarray:
    """Row numbers [copies, stop - start] of a piece; a lone row serves all copies."""
    stretch = piece.stretch
    start = first[id(stretch)] + piece.start - stretch.start
    stride = stretch.stop - stretch.start if stretch.copies > 1 else 0
    return start + np.arange(copies)[:, None] * stride + np.arange(piece.stop - piece.start)


def _first_rows(piece: Piece, copies: int, first: dict[int, int]) -> np.ndarray:
    return _rows(Piece(piece.stretch, piece.start, piece.start + 1), copies, first)[:, 0]


def _restores(restores: list, first: dict[int, int]) -> list[RestoreRows]:
    """Batches of restores; a row that is restored twice is in two batches, in order."""
    batches: list[tuple[bool, torch.Tensor | None, list, list, set]] = []
    for restore in restores:
        tensor = restore.source if isinstance(restore.source, torch.Tensor) else None
        copies = restore.target.stretch.copies
        rows = _rows(restore.target, copies, first).reshape(-1)
        if tensor is None:
            sources = _rows(restore.source, copies, first).reshape(-1)
        else:
            tensor = torch.atleast_2d(tensor)
            if tensor.shape[0] not in (1, copies):
                raise ValueError(f"a patch's tensor has {tensor.shape[0]} rows; expected 1 or the {copies} samples")
            sources = np.arange(copies) if tensor.shape[0] > 1 else np.zeros(copies, dtype=np.int64)
        last = batches[-1] if batches else None
        same = last is not None and last[0] == restore.add and last[1] is None and tensor is None
        if same and last[4].isdisjoint(rows.tolist()):
            last[2].append(rows), last[3].append(sources), last[4].update(rows.tolist())
        else:
            batches.append((restore.add, tensor, [rows], [sources], set(rows.tolist())))
    to = lambda parts: torch.from_numpy(np.concatenate(parts).astype(np.int64))  # noqa: E731
    return [RestoreRows(to(rows), to(sources), tensor, add) for add, tensor, rows, sources, _ in batches]


def _tables(entries: list[Entry], first: dict[int, int], num_layers: int) -> list[torch.Tensor]:
    """One table a layer. Lines are in order of birth, so tables grow at the end (what a line sees may change)."""
    entries = sorted((e for e in entries if e.since < num_layers), key=lambda e: e.since)  # stable
    line: dict[int, int] = {}
    count = 0
    for entry in entries:
        line[id(entry)] = count
        count += entry.copies
    table = np.empty((count, 5), dtype=np.int32)
    changes: dict[int, list[tuple[Entry, Entry | None, Piece]]] = {}
    until = [0] * num_layers
    for entry in entries:
        at, piece = line[id(entry)], entry.piece
        lines = table[at : at + entry.copies]
        lines[:, 0] = _first_rows(piece, entry.copies, first) if entry.query else -1
        lines[:, 2] = piece.start
        lines[:, 3] = piece.stop - piece.start
        for layer, parent, keys in entry.sights:
            if layer < num_layers:
                changes.setdefault(layer, []).append((entry, parent, keys))
        until[entry.since] = at + entry.copies
    tables, end = [], 0
    for layer in range(num_layers):
        for entry, parent, keys in changes.get(layer, ()):
            at = line[id(entry)]
            table[at : at + entry.copies, 1] = _first_rows(keys, entry.copies, first)
            base = -1 if parent is None else line[id(parent)]
            steps = np.arange(entry.copies) if parent is not None and parent.copies > 1 else 0
            table[at : at + entry.copies, 4] = base + steps
        end = max(end, until[layer])
        tables.append(torch.from_numpy(table[:end].copy()))
    return tables
