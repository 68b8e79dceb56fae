"""What may come of a malformed input: a result that is right, or an error that is for people."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import knowedit_ext as ke

KINDS = (ValueError, TypeError, OSError, FloatingPointError)
LONGEST = 4000  # characters of a message
PUBLIC = (ke.Edit, ke.EditRequest, ke.Fact, ke.Moments, ke.Report, ke.Trace)
PACKAGE = Path(ke.__file__).resolve().parent


@dataclass
class Case:
    """One input. call: the door it goes through; check: raises AssertionError where a result is wrong (and may say that
    it is one of "refused"); names: one of these must be in the message of an error; shown: the input in brief."""

    call: Callable[[], Any]
    check: Callable[[Any], str | None] = lambda result: None
    names: tuple[str, ...] = ()
    shown: str = ""


@dataclass
class Finding:
    target: str
    seed: int
    kind: str
    said: str
    where: str = ""
    shown: str = ""

    @property
    def family(self) -> tuple[str, str, str]:
        """What is one fault: the same thing said at the same place."""
        return self.target, self.kind, self.where or re.sub(r"\d+|'.*?'", "_", self.said)[:80]


def fault_of(error: BaseException, names: tuple[str, ...]) -> str | None:
    """Why an error is none for people; None where it is."""
    said = str(error)
    if not isinstance(error, KINDS):
        return f"{type(error).__name__} is no error for people"
    if not said.strip():
        return "says nothing"
    if "\n\n" in said or len(said) > LONGEST:
        return f"says too much ({len(said)} characters)"
    if not _meant(error):
        return f"{type(error).__name__} that nobody wrote"
    if names and not any(name in said for name in names):
        return f"names none of {', '.join(names)}"
    return None


def _meant(error: BaseException) -> bool:
    """Did the package raise it in so many words? Or the system, which says for which file."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    if isinstance(error, TypeError) and (call := re.match(r"[\w.]*?(\w+)\(\) (missing|takes|got) ", str(error))):
        return any(hasattr(owner, call[1]) for owner in (ke, *PUBLIC))  # Python's own, of a public one
    if not inside:
        return False
    last = frames[-1]
    return last is inside[-1] and linecache.getline(last.filename, last.lineno or 0).lstrip().startswith("raise ")


def where(error: BaseException) -> str:
    """The package's innermost line on the way to an error."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.lineno} {frame.name}"
    return ""
