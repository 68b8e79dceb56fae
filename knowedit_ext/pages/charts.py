"""Lines and bars of pages, told apart without colour vision on light and dark paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..plots import OKABE_ITO

COLOURS = (*OKABE_ITO[:-1], "#999999")  # seen on black too
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x")
DASHES = ("solid", "dash", "dot", "dashdot")
PATTERNS = ("", "/", "x", ".", "-", "|")
Numbers = Sequence[float | None]


def line(number: int, name: str, x: Sequence[Any], y: Numbers, half: Numbers, said: Sequence[str]) -> dict[str, Any]:
    """The `number`-th line. half: of the intervals, None where there is none; said: of each point."""
    look = number % len(COLOURS)
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        **_errors(half),
        "line": {"color": COLOURS[look], "dash": dash},
        "marker": {"symbol": SYMBOLS[look], "size": 8},
        "customdata": list(said),
    }


def level(number: int, name: str, x: Sequence[Any], y: float, said: str) -> dict[str, Any]:
    """A line that is the same everywhere."""
    flat = line(number, name, x, [y] * len(x), [None] * len(x), [said] * len(x))
    return flat | {"mode": "lines", "line": {"color": COLOURS[-1], "dash": "dot"}}


def bars(number: int, name: str, x: Sequence[str], y: Numbers, half: Numbers, said: Sequence[str]) -> dict[str, Any]:
    """The `number`-th bar of every group."""
    look = number % len(COLOURS)
    return {
        "type": "bar",
        "name": name,
        "x": list(x),
        "y": list(y),
        **_errors(half),
        "marker": {"color": COLOURS[look], "pattern": {"shape": PATTERNS[look], "solidity": 0.3}},
        "customdata": list(said),
    }


def _errors(half: Numbers) -> dict[str, Any]:
    if all(each is None for each in half):
        return {}
    return {"error_y": {"type": "data", "array": list(half), "thickness": 1, "width": 3}}
