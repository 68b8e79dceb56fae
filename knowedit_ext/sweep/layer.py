"""One decoder layer on packed rows."""

from __future__ import annotations

from contextlib import suppress

import torch

from ..model.families import ModuleMap, on_device
from ..model.hooks import Stop, first_of
from .attention import attending
from .capture import RowArguments
from .handed import join_rows, split_rows

KeysValues = tuple[torch.Tensor, ...]


def run_layer(
    modules: ModuleMap,
    number: int,
    hidden: torch.Tensor,  # [rows, hidden], and what is handed on
    arguments: RowArguments,
    segments: torch.Tensor,
    frozen: KeysValues | None = None,
    nearest: int = 0,
) -> tuple[torch.Tensor, KeysValues]:
    """Rows entering a layer -> those behind it, where the layer computes, and the layer's keys and values.

    Within `tree_attention_in`. segments, frozen, nearest: see `Attending`.
    """
    layer = modules.layers[number]
    hidden, found = split_rows(on_device(hidden, layer), arguments.handed(number))
    told = {"sight": arguments.sight(number), **arguments.whole(number)}
    with attending(modules.attn(number), segments, frozen, nearest, **told) as attended:
        out = layer(hidden[None], **arguments.layer(number, len(hidden), hidden.device), **found)
    return join_rows(first_of(out).squeeze(0), arguments.handed(number + 1), found), attended.recorded


def keys_values(modules: ModuleMap, number: int, hidden: torch.Tensor, arguments: RowArguments) -> KeysValues:
    """A layer's keys and values of rows [rows, hidden] that enter it; the layer is stopped there."""
    layer = modules.layers[number]
    hidden, found = split_rows(on_device(hidden, layer), arguments.handed(number))
    with suppress(Stop), attending(modules.attn(number), None, sight=arguments.sight(number)) as attended:
        layer(hidden[None], **arguments.layer(number, len(hidden), hidden.device), **found)
    return attended.recorded
