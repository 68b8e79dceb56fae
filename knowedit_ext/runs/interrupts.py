"""Ctrl-C that waits until what must not stay half done is done."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType, ModuleType

Handler = Callable[[int, FrameType | None], object]

AGAIN = 0.01  # seconds until an interrupt that has to wait is looked at again


def _handler() -> Handler | None:
    """What an interrupt leads to here and now; None where it leads to nothing of Python's."""
    handler = signal.getsignal(signal.SIGINT)
    return handler if callable(handler) and threading.current_thread() is threading.main_thread() else None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, an interrupt is kept; it is delivered at the end. (Outside the main thread Python delivers none.)"""
    before = _handler()
    if before is None:
        yield
        return
    kept: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: kept.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if kept:
            before(*kept[0])


def imported(name: str) -> ModuleType:
    """A module that is not imported before it is needed. One whose import is broken off is left in parts, and cannot
    be imported any more."""
    with uninterrupted():
        return import_module(name)


class whole_contexts:  # noqa: N801
    """Inside, an interrupt never comes while a context manager is being entered or left: it waits until that is done.

    Without that it may come at the very call of an `__exit__`, before its first line, and nothing is put back. To be
    entered before, and left behind, the contexts that put something back.
    """

    def __enter__(self) -> None:
        self._outside = list(_frames(sys._getframe(1)))  # what is entered or left around this is not waited for
        self._before, self._waiting = _handler(), False
        if self._before is not None:
            signal.signal(signal.SIGINT, self._interrupt)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        self._outside.clear()
        waiting, self._waiting = self._waiting, False
        if waiting:
            self._before(signal.SIGINT, sys._getframe())

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = _frames(sys._getframe(1))  # `frame` may be of before, from `uninterrupted`
        self._waiting = any(_enters_or_leaves(each) for each in now if each not in self._outside)
        if not self._waiting:
            self._before(number, frame)
            return
        later = threading.Timer(AGAIN, self._look_again)
        later.daemon = True
        later.start()

    def _look_again(self) -> None:
        if self._waiting:
            signal.raise_signal(signal.SIGINT)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _enters_or_leaves(frame: FrameType) -> bool:
    code = frame.f_code
    if code.co_filename == contextlib.__file__:
        return code.co_name != "inner"  # which is the whole of a function that is decorated with a context manager
    return code.co_name in ("__enter__", "__exit__")
