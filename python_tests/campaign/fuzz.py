"""Inputs by the thousand: each judged in a process that is bounded in memory and time, and watched from outside."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

from support.processes import hashes

from . import subjects
from .outcome import Case, Finding, fault_of, where
from .targets import DOORS

SECONDS = 20  # an input may take
MEMORY = 2 << 30  # bytes it may ask for beyond what the process has
SILENCE = 3 * SECONDS  # of a worker that no signal reaches

Input = tuple[str, int]  # door, seed


class TooLong(BaseException):
    """Not an `Exception`: nothing on the way may take it for one."""


def judge(door: str, seed: int, folder: Path) -> str | Finding:
    """ "accepted", "refused", or what is wrong; `folder` is empty before and after."""
    shown = ""
    try:
        try:
            case = DOORS[door](Random(f"{door}:{seed}"), folder)
        except Exception:
            return Finding(door, seed, "the campaign itself", traceback.format_exc()[-600:])
        shown = case.shown
        fault = _run(case, folder)
        subjects.check_models()
    except AssertionError as error:
        fault = ("changed model", f"{type(error).__name__}: {error}"[:600], "")
    finally:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return fault if isinstance(fault, str) else Finding(door, seed, *fault, shown=shown)


def _run(case: Case, folder: Path) -> str | tuple[str, str, str]:
    before = hashes(folder)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        result = case.call()
    except TooLong:
        return "time", f"takes longer than {SECONDS} s", ""
    except AssertionError as error:
        return "wrong result", str(error)[:600], where(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        fault = fault_of(error, case.names)
        if fault is not None:
            return fault, f"{type(error).__name__}: {error}"[:600], where(error)
        if _after(folder) != before:
            return "refused, but wrote", f"{sorted(_after(folder).items() ^ before.items())}"[:300], where(error)
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        return case.check(result) or "accepted"
    except Exception as error:
        return "wrong result", f"{type(error).__name__}: {error}"[:600], ""


def _after(folder: Path) -> dict[str, str]:
    return {name: content for name, content in hashes(folder).items() if not name.endswith(".lock")}


def bounded() -> None:
    """Bound this process: no more memory than it needs, and an alarm for what takes long."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def alarm(number: int, frame: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, alarm)


def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _work(inputs: Sequence[Input], pipe: Connection) -> None:
    quiet()
    bounded()
    folder = Path(mkdtemp(prefix="campaign-"))
    os.chdir(folder)  # what an input names may be a path
    subjects.watch()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        os.dup2(nowhere.fileno(), 1)
    for door, seed in inputs:
        found = judge(door, seed, folder)
        pipe.send((door, seed, found if isinstance(found, str) else asdict(found)))
    shutil.rmtree(folder, ignore_errors=True)
    pipe.close()


@dataclass
class _Worker:
    """A process and the inputs that it has not answered yet; a new one goes on behind an input that ended it."""

    left: list[Input]

    def start(self) -> None:
        fork = multiprocessing.get_context("fork")
        self.pipe, end = fork.Pipe(duplex=False)
        self.process = fork.Process(target=_work, args=(self.left, end))
        self.process.start()
        end.close()


def fuzz(inputs: Iterable[Input], processes: int = 2) -> Iterator[tuple[str, int, str | Finding]]:
    """(door, seed, outcome) of every input, as they are done."""
    inputs = list(inputs)
    subjects.watch()  # before the fork: shared by all
    workers = [_Worker(inputs[n::processes]) for n in range(processes) if inputs[n::processes]]
    for worker in workers:
        worker.start()
    while workers:
        for pipe in wait([worker.pipe for worker in workers], SILENCE) or [worker.pipe for worker in workers]:
            worker = next(w for w in workers if w.pipe is pipe)
            try:
                if not pipe.poll():
                    raise EOFError
                door, seed, found = pipe.recv()
                worker.left.pop(0)
                yield door, seed, found if isinstance(found, str) else Finding(**found)
            except EOFError:
                worker.process.kill()
                worker.process.join()
                if worker.left:
                    door, seed = worker.left.pop(0)
                    yield door, seed, Finding(door, seed, "ended the process", f"exit {worker.process.exitcode}")
                workers.remove(worker)
                if worker.left:
                    worker.start()
                    workers.append(worker)


def inputs_of(doors: Sequence[str], count: int, first: int = 0) -> list[Input]:
    """`count` inputs, the doors in turn."""
    return [(doors[n % len(doors)], first + n // len(doors)) for n in range(count)]
