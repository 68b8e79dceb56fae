"""Ctrl-C at a chosen call that Python makes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any


def interrupt(door: Callable[[], Any], at: int) -> bool:
    """Call `door`, with an interrupt as it makes its call number `at`; False where it makes fewer."""
    left = at

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        left -= event == "call"
        if left < 0:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.setprofile(count)
        door()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGINT, before)
    return left < 0
