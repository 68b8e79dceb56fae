"""What a collection writes while it goes on, so that it can be killed at any moment, and keeps for a larger one.

A collection with `max_tokens` ends within a group of texts, whose batches that limit has a part in. The sums before
that group are kept: a larger collection goes on from them to the same bits, and computes that group anew.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..runs.files import read_tensors, write_tensors
from ..runs.ranks import Ranks
from ..runs.settings import differing, spell
from .triangle import pack

logger = logging.getLogger(__name__)

_SHARE = 20  # at most one part in so many of the time goes into checkpoints


@dataclass
class Cursor:
    """How far the text has been gone through, by all ranks together.

    text: the current group's first text; before: tokens in the groups before it; batch: batches of it that are done;
    tokens: tokens done in all; texts, sha256: how many texts the done and current groups take, and their hash;
    count: keys in this rank's sums; cut: `max_tokens` has a part in the current group's batches.
    """

    text: int = 0
    before: int = 0
    batch: int = 0
    tokens: int = 0
    texts: int = 0
    sha256: str = ""
    count: int = 0
    cut: bool = False


class Checkpoint:
    """This rank's files under `out`; without `out` nothing is ever written.

    settings: of the collection, whatever its layers; weights: fingerprint of what a layer's keys depend on.
    """

    def __init__(
        self, out: Path | None, ranks: Ranks, settings: Mapping[str, Any], weights: Mapping[int, str], seconds: float
    ) -> None:
        self._ranks = ranks
        self._rank = f"rank{ranks.rank}of{ranks.size}"
        self._folder = None if out is None else out / "checkpoint"
        self._settings, self._weights = json.loads(json.dumps(settings)), weights
        self._seconds, self._last, self._cost = seconds, time.monotonic(), 0.0

    # -- while it goes on ------------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path | None:
        return None if self._folder is None else self._folder / f"{self._rank}.safetensors"

    def layers(self) -> list[int]:
        """Those that a collection was begun for and not finished; none where the ranks were not at one."""
        layers = [] if self._path is None or not self._path.exists() else self._state(self._path)["settings"]["layers"]
        mask = sum(1 << layer for layer in layers)
        same = all(self._ranks.agree(mask >> n & (2**60 - 1)) for n in range(0, max(self._weights, default=0) + 1, 60))
        return layers if same else []

    def load(self, layers: Sequence[int]) -> tuple[Cursor, dict[str, torch.Tensor], dict[str, Any]] | None:
        """Cursor, tensors and what `save` was given as `more`; None where nothing was begun, or to no use.

        ValueError for what was begun with other settings, but for a smaller `max_tokens`.
        """
        if self._folder is None or not self._folder.is_dir():
            return None
        size = self._rank.split("of")[1]
        others = [p.name for p in self._folder.glob("rank*of*.safetensors") if p.stem.split("of")[1] != size]
        if others:
            raise ValueError(
                f"'{self._folder}' holds checkpoints of another number of ranks ({others[0]}): go on with as many, or "
                "delete that folder to begin again"
            )
        if not self._path.exists():
            return None
        state = self._state(self._path)
        cursor, there, asked = Cursor(**state["cursor"]), state["settings"], self._asked(layers)
        larger = _exceeds(asked["max_tokens"], there["max_tokens"])
        if larger:
            there = there | {"max_tokens": asked["max_tokens"]}
        differences = differing(there, asked)
        if differences:
            raise ValueError(
                f"'{self._folder}' was begun with other settings ({spell(differences)}): choose another folder, or "
                "delete that one to begin again"
            )
        if larger and cursor.cut:
            logger.info("the smaller collection was killed in its last texts: these are computed again")
            return None
        return cursor, read_tensors(self._path)[0], state["more"]

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
        state = {"settings": self._asked(list(sums)), "cursor": asdict(cursor), "more": more}
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

    def _asked(self, layers: Sequence[int]) -> dict[str, Any]:
        weights = {str(layer): self._weights[layer] for layer in layers}
        return {**self._settings, "layers": list(layers), "weights": weights}

    # -- for a larger one ------------------------------------------------------------------------------------------

    def keep(self, cursor: Cursor, sums: Mapping[int, torch.Tensor]) -> None:
        """Sums before the group that `max_tokens` cuts, a file a layer: as large as the layer's moments again."""
        for layer, total in sums.items() if self._folder is not None else ():
            state = {"settings": self._whatever(layer), "cursor": asdict(cursor)}
            write_tensors(self._kept(layer), {"sum": pack(total)}, {"state": json.dumps(state)})

    def kept(self, layer: int) -> Cursor | None:
        """Where a layer can be gone on from, by all ranks."""
        cursor = None
        if self._folder is not None and self._kept(layer).exists():
            state = self._state(self._kept(layer))
            limit = self._settings["max_tokens"]
            if state["settings"] == self._whatever(layer) and (limit is None or limit >= state["cursor"]["tokens"]):
                cursor = Cursor(**state["cursor"])
        return cursor if self._ranks.agree(-1 if cursor is None else cursor.tokens) else None

    def kept_sum(self, layer: int) -> torch.Tensor:
        return read_tensors(self._kept(layer))[0]["sum"]

    def drop(self, layer: int) -> None:
        """Nothing is to be kept of it: its whole text was gone through, or nothing but one group."""
        if self._folder is not None and self._ranks.first:
            for path in self._folder.glob(f"layer_{layer}_rank*"):
                path.unlink(missing_ok=True)

    def _kept(self, layer: int) -> Path:
        return self._folder / f"layer_{layer}_{self._rank}.safetensors"

    def _whatever(self, layer: int) -> dict[str, Any]:
        """The settings of a layer, whatever `max_tokens` is."""
        rest = {key: value for key, value in self._settings.items() if key != "max_tokens"}
        return {**rest, "weights": self._weights[layer]}

    @staticmethod
    def _state(path: Path) -> dict[str, Any]:
        try:
            return json.loads(read_tensors(path, wanted=())[1]["state"])
        except KeyError as error:
            raise ValueError(f"'{path}' is no checkpoint: it lacks its {error}") from error


def _exceeds(asked: int | None, there: int | None) -> bool:
    return there is not None and (asked is None or asked > there)
