"""Runs of a script in processes of their own, and what they leave in a folder."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .forked import Forked, Ranks

TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def hashes(folder: Path) -> dict[str, str]:
    """Every file below the folder, and what it holds."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """Inside, no more than so many files can be written: those that come then meet a full disk."""
    real, left = os.fsync, itertools.count(after, -1)

    def fsync(number: int) -> None:
        if next(left) <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    os.fsync = fsync
    try:
        yield
    finally:
        os.fsync = real


def start(script: str, out: Path, *launcher: str, stderr: bool = False) -> subprocess.Popen:
    """The script, whose argument is `out`, beside that folder; stderr: it is kept, to be read at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    path = out.parent / "script.py"
    path.write_text(script)
    command = [sys.executable, *launcher, str(path), str(out)]
    kept = subprocess.PIPE if stderr else None
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=kept, env=environment, cwd=out.parent)


def fork(script: str, out: Path, ranks: int = 1, errors: bool = False, folder: Path | None = None) -> Forked | Ranks:
    """As `start`, where torch and the package are imported already; beside `out`, or in a folder."""
    folder = folder or out.parent
    path = folder / "script.py"
    path.write_text(script)
    run = (str(path), str(out))
    return Ranks(run, folder, ranks) if ranks > 1 else Forked(run, folder, errors)


def finish(process: subprocess.Popen | Forked | Ranks) -> None:
    process.communicate()
    assert process.returncode == 0


def kill_at(process: subprocess.Popen | Forked, out: Path, pattern: str, files: int) -> None:
    """kill -9 once more than so many files are there; the script says a line when it begins."""
    process.stdout.readline()
    while process.poll() is None and len(list(out.glob(pattern))) <= files:
        time.sleep(0.002)
    process.kill()
    process.communicate()
