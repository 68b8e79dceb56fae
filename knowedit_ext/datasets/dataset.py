"""What a data set is to an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .questions import Asked
from .records import Records


@dataclass(frozen=True)
class Dataset:
    """A data set: its file holds one of these, and the table in `datasets` names it.

    detect(record): is it one of this data set's, published or loaded? load(source, *, skip_bad, limit): its records,
    checked, in CounterFact's layout; records that were loaded before are checked again. ask(model, record, edit,
    attributes, compat): the questions about a record. generates: records may have prompts whose continuations are
    measured. baseline: what the unedited model knows decides what is measured of the edited one.
    """

    name: str
    detect: Callable[[Mapping[str, Any]], bool]
    load: Callable[..., Records]
    ask: Callable[..., Asked]
    generates: bool = False
    baseline: bool = False
