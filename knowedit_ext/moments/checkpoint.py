"""What a collection writes while it goes on, so that it can be killed at any moment: sums and cursor in one file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..runs.files import read_tensors, write_tensors
from ..runs.ranks import Ranks
from .triangle import pack

_SHARE = 20  # at most one part in so many of the time goes into checkpoints


@dataclass
class Cursor:
    """How far the text has been gone through, by all ranks together.

    text: the current group's first text; before: tokens in the groups before it; batch: batches of it that are done;
    tokens: tokens done in all; texts, sha256: how many texts the done and current groups take, and their hash;
    count: keys in this rank's sums.
    """

    text: int = 0
    before: int = 0
    batch: int = 0
    tokens: int = 0
    texts: int = 0
    sha256: str = ""
    count: int = 0


class Checkpoint:
    """This rank's file under `out`; without `out` nothing is ever written."""

    def __init__(self, out: Path | None, ranks: Ranks, settings: Mapping[str, Any], seconds: float) -> None:
        self._ranks = ranks
        self._name = f"rank{ranks.rank}of{ranks.size}.safetensors"
        self._folder = None if out is None else out / "checkpoint"
        self._settings = json.loads(json.dumps(settings))
        self._seconds, self._last, self._cost = seconds, time.monotonic(), 0.0

    @property
    def _path(self) -> Path | None:
        return None if self._folder is None else self._folder / self._name

    def load(self) -> tuple[Cursor, dict[str, torch.Tensor], dict[str, Any]] | None:
        """Cursor, tensors and what `save` was given as `more`; None where nothing was begun."""
        if self._folder is None or not self._folder.is_dir():
            return None
        for left in self._folder.glob(f".{self._name}.*.tmp"):  # what a killed run was writing
            left.unlink(missing_ok=True)
        others = [p.name for p in self._folder.glob("rank*of*.safetensors") if p.name.split("of")[1] != self._size]
        if others:
            raise ValueError(
                f"'{self._folder}' holds checkpoints of another number of ranks ({others[0]}): go on with as many, or "
                "delete that folder to begin again"
            )
        if not self._path.exists():
            return None
        tensors, metadata = read_tensors(self._path)
        state = json.loads(metadata["state"])
        said = differing(state["settings"], self._settings)
        if said:
            raise ValueError(
                f"'{self._folder}' was begun with other settings ({said}): choose another folder, or delete that one "
                "to begin again"
            )
        return Cursor(**state["cursor"]), tensors, state["more"]

    @property
    def _size(self) -> str:
        return self._name.split("of")[1]

    @property
    def due(self) -> bool:
        return self._folder is not None and time.monotonic() - self._last >= max(self._seconds, _SHARE * self._cost)

    def save(
        self, cursor: Cursor, sums: Mapping[int, torch.Tensor], tensors: Mapping[str, torch.Tensor], more: Mapping
    ) -> None:
        if self._path is None:
            return
        start = time.monotonic()
        packed = {f"sum.{layer}": pack(total) for layer, total in sums.items()}
        state = {"settings": self._settings, "cursor": asdict(cursor), "more": more}
        write_tensors(self._path, packed | dict(tensors), {"state": json.dumps(state)})
        self._last = time.monotonic()
        self._cost = self._last - start

    def remove(self) -> None:
        """All ranks together, once the result is written."""
        if self._path is None:
            return
        self._path.unlink(missing_ok=True)
        self._ranks.wait()
        if self._ranks.first and self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()


def differing(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The settings that differ, in words; empty where none does."""

    def short(value: object) -> str:
        text = repr(value)
        return text if len(text) <= 40 else text[:37] + "..."

    keys = [k for k in {**there, **asked} if there.get(k) != asked.get(k)]
    return "; ".join(f"{k}: {short(there.get(k))} there, {short(asked.get(k))} asked" for k in keys)
