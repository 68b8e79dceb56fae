"""Ctrl-C while `knowedit` starts or imports, which takes seconds: exit status 130, as later, and no traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType, ModuleType

from .runs.interrupts import imported

INTERRUPTED = 130
_begun = False


def _is_command() -> bool:
    """Was this process started as the command, not by a program that imports us?"""
    program = next(iter(getattr(sys, "argv", [])), "")
    as_module = program == "-m" and "knowedit_ext" in sys.orig_argv  # what runpy has there while it imports us
    return as_module or os.path.splitext(os.path.basename(program))[0] == "knowedit"


def started() -> None:
    """From here on an interrupt is the command's own matter, except within an import."""
    global _begun
    _begun = True


def end(number: int, frame: FrameType | None) -> None:
    if not _begun or _importing(frame):
        os._exit(INTERRUPTED)  # what is half imported could only complain
    signal.default_int_handler(number, frame)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextmanager
def as_command() -> Iterator[None]:
    """Inside, an interrupt does what it does to the command."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is end and before is not end:
            signal.signal(signal.SIGINT, before)


def package(name: str) -> ModuleType:
    """A part of ours, with torch and all. An interrupt ends the command; elsewhere it waits until that is done."""
    return import_module(name) if signal.getsignal(signal.SIGINT) is end else imported(name)


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)
