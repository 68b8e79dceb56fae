"""Tidy rows as a pandas DataFrame, where pandas is installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .extras import require
from .runs.interrupts import imported

if TYPE_CHECKING:
    import pandas


def frame(rows: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """A line a row; `MissingExtraError` names the line to type where pandas is not installed."""
    require("pandas")
    return imported("pandas").DataFrame(list(rows))
