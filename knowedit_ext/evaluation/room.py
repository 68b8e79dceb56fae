"""Keys and values of texts in progress, in memory that has room for all tokens to come.

transformers' dynamic cache copies all keys and values of a layer for every token, to put the new ones behind them. Here
they are written in place, and attention gets views: the same numbers, at the same places.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def make_room(cache: Any, tokens: int) -> None:
    """Give a cache's layers room for `tokens` more; what holds other things than keys and values stays as it is."""
    kinds = {DynamicLayer: _Roomy, DynamicSlidingWindowLayer: _RoomyWindow}
    for number, layer in enumerate(getattr(cache, "layers", ())):
        kind = kinds.get(type(layer))
        if kind is not None and layer.is_initialized:
            cache.layers[number] = kind(layer, tokens)


class _Roomy(DynamicLayer):
    """What another layer holds, in the first `filled` columns of `room` (keys, values: [texts, heads, columns, d])."""

    def __init__(self, layer: DynamicLayer, tokens: int) -> None:
        self.__dict__.update(layer.__dict__)
        self.filled = self.keys.shape[-2]
        self.room = []
        for held in (self.keys, self.values):
            room = held.new_zeros(*held.shape[:2], self.filled + tokens, held.shape[-1])
            room[:, :, : self.filled] = held
            self.room.append(room)
        self._hold()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the next tokens' keys and values; those that the next tokens see."""
        before = self.filled
        self.filled += key_states.shape[-2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, before : self.filled] = new
        self._hold()
        return self._from(max(0, before - self._kept(before)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Of the texts only `indices`."""
        self.room = [room[indices] for room in self.room]
        self._hold()

    def _hold(self) -> None:
        self.keys, self.values = self._from(self.filled - self._kept(self.filled))

    def _from(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(room[:, :, first : self.filled] for room in self.room)

    def _kept(self, filled: int) -> int:
        """How many of so many tokens the layer holds for those to come."""
        return filled


class _RoomyWindow(_Roomy, DynamicSlidingWindowLayer):
    """The same where a token sees those of a window alone."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.cumulative_length += key_states.shape[-2]
        return super().update(key_states, value_states)

    def _kept(self, filled: int) -> int:
        return min(filled, self.sliding_window - 1)
