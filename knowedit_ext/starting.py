"""Ctrl-C while `knowedit` is still being imported, which takes seconds: exit status 130, as later, and no traceback."""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130


def _is_command() -> bool:
    """Was this process started as the command, not by a program that imports us?"""
    program = next(iter(getattr(sys, "argv", [])), "")
    as_module = program == "-m" and "knowedit_ext" in sys.orig_argv  # what runpy has there while it imports us
    return as_module or os.path.splitext(os.path.basename(program))[0] == "knowedit"


def started() -> None:
    """From here on an interrupt is the command's own matter."""
    if signal.getsignal(signal.SIGINT) is end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end(number: int, frame: object) -> None:
    os._exit(INTERRUPTED)  # nothing has been begun, and what is half imported could only complain


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)
