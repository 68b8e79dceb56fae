"""The metrics, a file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ...datasets.questions import Asked, Scores
from ...model.load import EditableModel
from ..metric import Metric

METRICS: list[Metric] = sorted(
    (import_module(f"{__name__}.{file.name}").METRIC for file in iter_modules(__path__)), key=lambda m: m.order
)


def asking(ask: Callable[..., Asked]) -> Callable[..., Asked]:
    """A data set's `ask`, with the questions of the metrics behind its own."""

    def ask_all(
        model: EditableModel, record: Mapping[str, Any], edit: int, attributes: bool = False, compat: str | None = None
    ) -> Asked:
        own = [metric.ask(record, edit) for metric in METRICS if metric.ask is not None]
        parts = [ask(model, record, edit, attributes, compat), *own]

        def read(scores: Scores, before: Scores | None = None) -> dict[str, Any]:
            first, measured = 0, {}
            for questions, read_part in parts:
                part = slice(first, first + len(questions))
                measured |= read_part(scores[part], None if before is None else before[part])
                first = part.stop
            return measured

        return [question for questions, _ in parts for question in questions], read

    return ask_all
