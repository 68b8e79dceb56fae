"""Runs of a command in processes forked from this one, which has imported everything; ended from inside or outside."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from select import select
from typing import Any

from knowedit_ext import starting

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


@dataclass(frozen=True)
class Blow:
    """What happens to a run. signal: which one; after: seconds from the start, or at: just before the so-manieth change
    of a file; file_size: files cannot grow beyond so many bytes: a full disk, or with SIGKILL death in mid-write."""

    signal: int = 0
    after: float | None = None
    at: int | None = None
    file_size: int | None = None


@dataclass(frozen=True)
class Ending:
    """status: of the exit, or minus the signal; said: stdout and stderr; seconds; changes: of files, in all."""

    status: int
    said: str
    seconds: float
    changes: int

    @property
    def killed(self) -> bool:
        return self.status in (-signal.SIGKILL, -signal.SIGXFSZ)


class Run:
    """`job` in a process of its own, in `folder`; it returns an exit status."""

    def __init__(self, job: Callable[[], int], folder: Path, blow: Blow | None = None) -> None:
        self._blow = blow or Blow()
        self._began, self._said, self.ending = time.monotonic(), b"", None
        self._pipe, end = os.pipe()
        self._count, counted = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child can take it
        self.pid = os.fork()
        if not self.pid:
            os.close(self._pipe)
            os.close(self._count)
            _child(job, folder, self._blow, end, counted)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(end)
        os.close(counted)

    def wait(self) -> Ending:
        """Until it has ended, of itself or by the blow."""
        struck = self._blow.after is None
        while True:
            left = None if struck else max(0.0, self._began + self._blow.after - time.monotonic())
            if select([self._pipe], [], [], left)[0]:
                data = os.read(self._pipe, 65536)
                if not data:
                    break
                self._said += data
            elif not struck:
                os.kill(self.pid, self._blow.signal)
                struck = True
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        changes = len(os.read(self._count, 1 << 20))
        os.close(self._pipe)
        os.close(self._count)
        return Ending(status, self._said.decode("utf-8", "replace"), time.monotonic() - self._began, changes)


def _child(job: Callable[[], int], folder: Path, blow: Blow, end: int, counted: int) -> None:
    status = 1
    try:
        os.dup2(end, 1)
        os.dup2(end, 2)
        os.close(end)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.chdir(folder)
        signal.signal(signal.SIGINT, starting.end)  # as while `knowedit` is imported: until the job says `started`
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        _stop_the_clock()
        _watch_changes(folder, blow, counted)
        if blow.file_size is not None:
            deadly = blow.signal == signal.SIGKILL
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (blow.file_size, blow.file_size))
        status = job()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _stop_the_clock() -> None:
    """Seconds that something took are part of some results: here everything takes none."""
    time.perf_counter = lambda: 0.0
    for name, module in list(sys.modules.items()):
        if name.startswith("knowedit_ext") and hasattr(module, "perf_counter"):
            module.perf_counter = time.perf_counter


def _watch_changes(folder: Path, blow: Blow, counted: int) -> None:
    """Count what is about to change a file, by Python's own reports of it, and strike when it is time."""
    inside, number = str(folder.resolve()), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & _WRITES:
                return
        elif event in _CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.path.abspath(os.fsdecode(path)).startswith(inside):
            return
        os.write(counted, b".")
        number += 1
        if number - 1 == blow.at:
            os.kill(os.getpid(), blow.signal)

    sys.addaudithook(hook)


def command(*arguments: str) -> Callable[[], int]:
    """`knowedit` with these arguments, as a job."""

    def job() -> int:
        from knowedit_ext.cli import main

        sys.argv = ["knowedit", *arguments]
        try:
            main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        return 0

    return job
