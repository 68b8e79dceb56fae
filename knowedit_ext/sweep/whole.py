"""Modules that mix tokens by other means than `AttentionInterface`: run on whole sequences, as Hugging Face runs them.

Linear attention, convolutions, state spaces, and attention classes that came with a checkpoint have no keys to share in
a tree that we could hand them. Of every segment the whole sequence is put together from what the module reads in its
ancestors' rows and its own, and the segment's own rows of the result are kept. All else of a layer stays packed.
A segment of n rows at position p costs the module a prompt's length instead of n rows: slower, and as exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..model.families import ModuleMap, UnsupportedModelError
from ..model.hooks import Stop, first_of, named_arguments
from ..ops.reference import ancestors
from .own_scores import around_scores

ROWS = 4096  # of sequences held at once
_BATCH_AND_HEADS = ("alibi",)  # laid out [batch * heads, ...]


def runs_whole(mixer: nn.Module) -> bool:
    """Whether the module does not look its attention function up, call an `_attn` to wrap, nor is in `own_scores`."""
    names = inspect.unwrap(type(mixer).forward).__code__.co_names
    return around_scores(mixer) is None and not {"get_interface", "ALL_ATTENTION_FUNCTIONS", "_attn"} & set(names)


def mixes_whole(modules: ModuleMap) -> bool:
    return modules.family.whole or any(runs_whole(modules.attn(layer)) for layer in range(len(modules.layers)))


def passed_on(mixer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """By name what a mixer got in a clean run of one prompt; None for each tensor of rows, which a sweep hands over."""
    named = named_arguments(mixer, args, kwargs)
    hidden = next(iter(named.values()))
    return {name: None if _is_rows(value, hidden) else value for name, value in named.items()}


def _is_rows(value: Any, hidden: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == hidden.shape and value.dtype == hidden.dtype


def mix_whole(mixer: nn.Module, own_forward: Any, layer: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The mixer's output for packed rows [1, rows, hidden]; layer: the `Attending` in progress."""
    named = named_arguments(mixer, args, kwargs)
    hidden = next(iter(named.values()))
    packed = {name: value[0] for name, value in named.items() if _is_rows(value, hidden)}
    layer.recorded = tuple(packed.values())
    if layer.segments is None:
        raise Stop
    if layer.frozen is not None:
        parts = zip(packed, layer.frozen, layer.recorded, strict=True)
        packed = {name: torch.cat([frozen.to(own.device), own]) for name, frozen, own in parts}
    answers, places, others = [], [], 0
    for run, index, kept, rows in _sequences(mixer, layer):
        given = dict(layer.mixing[run])
        for name, value in given.items():
            if name in _BATCH_AND_HEADS and value is not None:
                given[name] = value.repeat(len(index), *[1] * (value.dim() - 1))
        index = index.to(hidden.device)
        out = own_forward(**(given | {name: value[index] for name, value in packed.items()}))
        others = len(out) - 1 if isinstance(out, tuple) else 0
        answers.append(first_of(out).flatten(0, 1)[kept.to(hidden.device)])
        places.append(rows)
    found = torch.cat(answers)
    mixed = found.new_zeros(hidden.shape[1], found.shape[-1]).index_copy(0, torch.cat(places).to(found.device), found)
    return (mixed[None], *[None] * others) if others else mixed[None]


def _sequences(mixer: nn.Module, layer: Any) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(a prompt's number, [sequences, its length] of kv rows, which of the flattened places are a segment's own, the
    query rows that those are). Behind a segment's end its last row is repeated, which no token before it sees."""
    query_row, kv_row, position, length, _ = layer.segments.cpu().long().unbind(1)
    above_rows, above_positions, above_mask = ancestors(layer.segments.cpu())
    asking = torch.nonzero(query_row >= 0)[:, 0].tolist()
    by_length: dict[int, list[int]] = {}
    run_of: dict[int, int] = {}
    for line in asking:
        run = layer.run_of_row(int(query_row[line]))
        by_length.setdefault(layer.lengths[run], []).append(line)
        run_of.setdefault(layer.lengths[run], run)
    for whole, lines in by_length.items():
        for first in range(0, len(lines), max(1, ROWS // whole)):
            part = lines[first : first + max(1, ROWS // whole)]
            index, kept, rows = torch.empty(len(part), whole, dtype=torch.int64), [], []
            for n, line in enumerate(part):
                start, count = int(position[line]), int(length[line])
                seen = above_mask[line]
                left = above_positions[line][seen]
                order = left.argsort()
                if not torch.equal(left[order], torch.arange(start)):
                    raise UnsupportedModelError(
                        f"{type(mixer).__name__} has no attention edges that could be cut: it runs whole sequences"
                    )
                own = torch.arange(count)
                index[n, :start] = above_rows[line][seen][order]
                index[n, start : start + count] = kv_row[line] + own
                index[n, start + count :] = kv_row[line] + count - 1
                kept.append(n * whole + start + own)
                rows.append(query_row[line] + own)
            yield run_of[whole], index, torch.cat(kept), torch.cat(rows)
