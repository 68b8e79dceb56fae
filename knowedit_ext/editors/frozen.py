"""What training never changes of a text, computed once: states below the edited layers, and what was said before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..model.head import Said, final_states
from ..model.load import EditableModel
from ..sweep.capture import CleanRun, clean_runs
from ..sweep.packed import PackedPrompts

KEPT_BYTES = 1 << 30


@dataclass
class _Kept:
    """rows: those that enter the lowest edited layer; said: what the unedited model says behind each."""

    run: CleanRun
    rows: torch.Tensor
    said: Said | None = None

    @property
    def bytes(self) -> int:
        parts = [self.run.hidden, self.rows, *(x for x in self.said or () if x is not None)]
        return sum(x.numel() * x.element_size() for x in parts)


class Frozen:
    """Of a model below layer `first`; texts by their token ids, as long as they fit in `KEPT_BYTES`."""

    def __init__(self, model: EditableModel, first: int) -> None:
        self.model, self.first = model, first
        self._kept: dict[tuple[int, ...], _Kept] = {}
        self._sizes: dict[tuple[int, ...], int] = {}

    def packed(self, texts: Sequence[tuple[int, ...]]) -> tuple[PackedPrompts, torch.Tensor]:
        """The texts as packed rows, and the rows that enter layer `first`."""
        found = self._of(texts)
        return self._packed([found[ids] for ids in texts])

    @torch.no_grad()
    def said(self, texts: Sequence[tuple[int, ...]]) -> Said:
        """What the unedited model says behind each token of the texts."""
        found = self._of(texts)
        if new := {ids: each for ids, each in found.items() if each.said is None}:
            packed, hidden = self._packed(list(new.values()))
            states = final_states(self.model, packed.run(hidden, self.first, self.model.num_layers))
            for ids, own in zip(new, Said.of(self.model, states).split([len(ids) for ids in new]), strict=True):
                found[ids].said = own
                self._keep(ids, found[ids])
        return Said.join([found[ids].said for ids in texts])

    def _packed(self, texts: Sequence[_Kept]) -> tuple[PackedPrompts, torch.Tensor]:
        return PackedPrompts(self.model, [each.run for each in texts]), torch.cat([each.rows for each in texts])

    @torch.no_grad()
    def _of(self, texts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], _Kept]:
        found = {ids: self._kept[ids] for ids in texts if ids in self._kept}
        if new := [ids for ids in dict.fromkeys(texts) if ids not in found]:
            runs = clean_runs(self.model, new)
            packed = PackedPrompts(self.model, runs)
            hidden = packed.run(packed.start, 0, self.first)
            for ids, run, rows in zip(new, runs, hidden.split([len(ids) for ids in new]), strict=True):
                found[ids] = _Kept(run, rows.clone())
                self._keep(ids, found[ids])
        return found

    def _keep(self, ids: tuple[int, ...], text: _Kept) -> None:
        """Where there is no room, what was kept last goes first: an epoch comes to the others before."""
        self._forget(ids)
        while self._kept and sum(self._sizes.values()) + text.bytes > KEPT_BYTES:
            self._forget(next(reversed(self._kept)))
        self._kept[ids], self._sizes[ids] = text, text.bytes

    def _forget(self, ids: tuple[int, ...]) -> None:
        self._kept.pop(ids, None)
        self._sizes.pop(ids, None)
