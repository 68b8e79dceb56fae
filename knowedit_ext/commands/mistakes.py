"""What went wrong, in one line for people."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator

from safetensors import SafetensorError

LESS_MEMORY = (
    "Less is held at once with a smaller --max-rows (trace, evaluate) or --batch-tokens (moments), a model takes half "
    "with --dtype bfloat16"
)
# What people can put right. Others are faults of the program and keep their traceback.
MISTAKES = (
    ValueError,
    TypeError,
    NotImplementedError,
    OSError,
    ImportError,
    ArithmeticError,
    MemoryError,
    SafetensorError,
    RuntimeError,  # torch, about devices and shapes
)


def explain(error: BaseException) -> str | None:
    """One line on what was wrong; None for what is no mistake of the user's."""
    if not isinstance(error, MISTAKES) or isinstance(error, RecursionError):
        return None
    if any(map(out_of_memory, _chain(error))):
        return f"out of memory: {_one_line(error)}. {LESS_MEMORY}"
    if any(map(disk_full, _chain(error))):
        return f"the disk is full: {_one_line(error)}. What was finished is whole; go on with the same command"
    if isinstance(error, OSError):
        return _of_a_file(error)
    if isinstance(error, SafetensorError):
        return f"a safetensors file cannot be read or written: {_one_line(error)}"
    text = _one_line(error) or type(error).__name__
    return text if _meant(error) else f"{text} (KNOWEDIT_DEBUG=1 shows where)"


def _meant(error: BaseException) -> bool:
    """Was it written for people? A RuntimeError is torch's, and many a TypeError what Python makes of a call."""
    if type(error) is RuntimeError:
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return type(error) is not TypeError or not frames or (frames[-1].line or "").startswith("raise ")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def out_of_memory(error: BaseException) -> bool:
    """Memory of a GPU (`torch.OutOfMemoryError`) or of the machine, which torch reports as a plain RuntimeError."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc")
    text = str(error).lower()
    torch = sys.modules.get("torch")  # where it has not been imported, nothing of it was raised
    of_torch = (torch.OutOfMemoryError,) if torch is not None else ()
    return isinstance(error, (MemoryError, *of_torch)) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


def disk_full(error: BaseException) -> bool:
    """No space, a quota or a limit on the size of files; safetensors says it in words."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in numbers:
        return True
    return isinstance(error, SafetensorError) and any(os.strerror(number) in str(error) for number in numbers)


def _of_a_file(error: OSError) -> str:
    if error.filename is not None and error.strerror:
        return f"'{os.fsdecode(error.filename)}': {error.strerror}"
    return _one_line(error) or type(error).__name__


def _one_line(error: BaseException) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
