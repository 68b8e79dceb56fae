"""One run at a time writes to a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from .files import remove_unfinished
from .ranks import Ranks

LOCK = ".lock"


class Busy(ValueError):
    """A folder that another run is writing to."""


@contextmanager
def alone(folder: str | Path, ranks: Ranks | None = None, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder, which is made where it is not there; all `ranks` of a run hold it together.

    `Busy`, a ValueError, where another process, or another run of this one, is writing there for longer than `patience`
    (seconds). The system lets go of the lock of a process that is killed. What such a process left half written is
    removed.
    """
    folder, ranks = Path(folder), ranks or Ranks()
    lock, held, made = None, True, not folder.exists()
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=patience, poll_interval=0.02)
        except Timeout:
            held = False
    if not int(ranks.from_first(torch.tensor(int(held)))):
        raise Busy(
            f"another run is writing to '{folder}': wait until it is finished (the same call then finds its results), "
            "or choose another folder"
        )
    try:
        if lock is not None:
            remove_unfinished(folder, *(path for path in folder.iterdir() if path.is_dir()))
        yield
    finally:
        if lock is not None:
            # While it is held: who waits for this very file finds it gone once it has it, and makes a new one.
            (folder / LOCK).unlink(missing_ok=True)
            lock.release()
            if made:
                with suppress(OSError):  # nothing was written, or there is more in it
                    folder.rmdir()
