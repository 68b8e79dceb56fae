"""What layers take from earlier ones (the keys and values of Gemma 4 E2B and E4B): columns of a row, behind its state.

The model passes all its layers one mapping, which some of them fill and later ones read. Here each row carries its own
part of it from layer to layer: whoever copies, cuts or keeps rows has that too, and gradients flow through it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Handed:
    """What a layer finds in a mapping: by key a tuple of tensors [1, heads, rows, d], of each (heads, d)."""

    kind: type[MutableMapping]
    shapes: tuple[tuple[Any, tuple[tuple[int, int], ...]], ...]

    @classmethod
    def of(cls, mapping: MutableMapping, tokens: int) -> Handed:
        """As a prompt of `tokens` tokens has it. What is not laid out so is left out: who reads it does not find it."""
        shapes = [(key, _shapes(value, tokens)) for key, value in mapping.items()]
        return cls(type(mapping), tuple((key, found) for key, found in shapes if found))

    @property
    def width(self) -> int:
        return sum(heads * d for _, shapes in self.shapes for heads, d in shapes)

    def mapping(self, columns: torch.Tensor) -> MutableMapping:
        """[rows, width] -> a mapping of all these rows."""
        filled = self.kind()
        first = 0
        for key, shapes in self.shapes:
            widths = [heads * d for heads, d in shapes]
            parts = columns[:, first : first + sum(widths)].split(widths, 1)
            rows = [part.contiguous().unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
            filled[key] = tuple(x.transpose(0, 1)[None] for x in rows)
            first += sum(widths)
        return filled

    def columns(self, mapping: MutableMapping) -> list[torch.Tensor]:
        """And back, [rows, heads * d] each."""
        return [x[0].transpose(0, 1).flatten(1) for key, _ in self.shapes for x in mapping[key]]


def _shapes(value: Any, tokens: int) -> tuple[tuple[int, int], ...]:
    tensors = value if isinstance(value, tuple) else ()
    alike = all(isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[::2] == (1, tokens) for x in tensors)
    return tuple((x.shape[1], x.shape[3]) for x in tensors) if alike else ()


def split_rows(rows: torch.Tensor, handed: Mapping[str, Handed]) -> tuple[torch.Tensor, dict[str, MutableMapping]]:
    """Rows entering a layer -> their states [rows, hidden], and by argument the mapping that it finds."""
    if not handed:
        return rows, {}
    widths = [each.width for each in handed.values()]
    states, *columns = rows.split([rows.shape[1] - sum(widths), *widths], 1)
    return states, {name: handed[name].mapping(own) for name, own in zip(handed, columns, strict=True)}


def join_rows(
    states: torch.Tensor, handed: Mapping[str, Handed], mappings: Mapping[str, MutableMapping]
) -> torch.Tensor:
    """States behind a layer, and the mappings as it left them -> the rows that enter the next."""
    columns = [x.to(states.device) for name, each in handed.items() for x in each.columns(mappings[name])]
    return torch.cat([states, *columns], 1) if columns else states
