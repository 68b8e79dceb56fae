"""What a metric is to an evaluation: what it asks, what it measures of written texts, and its columns in the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any

import numpy as np

from ..datasets.questions import Asked, Question, Scores, rewrites_of, spellings

if TYPE_CHECKING:
    from ..model.load import EditableModel
    from .edited import Edited
    from .metrics.consistency import TfIdf

LARGEST = 1e100  # of a number that is measured: its square is finite too


@dataclass(frozen=True)
class Written:
    """What metrics of texts see. texts, references: of each record what the model wrote, and the snippets of its new
    target (None: there are none to compare with); tfidf: the words' weights. edited: with record n under its edit n."""

    model: EditableModel
    records: Sequence[Mapping[str, Any]]
    texts: Sequence[list[str]]
    references: Sequence[Sequence[Mapping[str, str]]] | None
    tfidf: TfIdf | None
    edited: Edited | None
    max_length: int
    compat: str | None


@dataclass(frozen=True)
class Metric:
    """A metric: its file in `metrics` holds one, and the table there finds it.

    columns: its names in tables; order: where they stand there, the papers' own below 100.
    read(measured): a case's "pre" or "post" -> value of each column that it has, a mean over the case's prompts.
    ask(record, edit): questions beyond the data set's own, see `datasets.questions.Asked`; None: nothing is asked.
    measure(written): what it makes of the texts that the model wrote, a dict for each record; None: nothing.
    """

    columns: tuple[str, ...]
    order: int
    read: Callable[[Mapping[str, Any]], dict[str, float]]
    ask: Callable[[Mapping[str, Any], int], Asked] | None = None
    measure: Callable[[Written], list[dict[str, Any]]] | None = None


def number(value: Any, key: str, least: float = -LARGEST, most: float = LARGEST) -> float:
    """A value of a case; ValueError with its key where it is no finite number between these."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real) or not least <= value <= most:
        limits = "" if most == LARGEST else f" from {least} to {most}"
        raise ValueError(f"{key} is {brief(value)}: expected a finite number{limits}")
    return float(value)


def items(measured: Mapping[str, Any], key: str, read: Callable[[Any, str], Any]) -> list[Any]:
    """What a case's list holds, each item through `read`, which is told its key too; empty where it has none."""
    values = measured.get(key)
    if values is None:
        return []
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{key} is {brief(values)}: expected a list")
    return [read(value, f"{key}[{n}]") for n, value in enumerate(values)]


def _share(value: Any, key: str) -> float:
    return float(value) if isinstance(value, (bool, np.bool_)) else number(value, key, 0, 1)


def scaled(key: str, column: str, scale: float) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """Reads one number of a case, where it has one."""

    def read(measured: Mapping[str, Any]) -> dict[str, float]:
        return {} if measured.get(key) is None else {column: scale * number(measured[key], key)}

    return read


def shares(columns: Mapping[str, str]) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """Reads, for each {sort: column}, the mean of {sort}_correct as a percentage."""

    def read(measured: Mapping[str, Any]) -> dict[str, float]:
        there = {column: items(measured, f"{sort}_correct", _share) for sort, column in columns.items()}
        return {column: 100.0 * float(np.mean(correct)) for column, correct in there.items() if correct}

    return read


def answered(columns: Mapping[str, str], order: int, kept: tuple[str, str] | None = None) -> Metric:
    """Prompts with an answer of their own, record[sort] = [{"prompt", "target", "aliases"}], for {sort: column}: the
    share of the answer's tokens that are the likeliest, of the alias of which most are.

    kept: (key, column) of the share of tokens said in the answers' places that are what the unedited model says there.
    """

    def ask(record: Mapping[str, Any], edit: int) -> Asked:
        pairs = [(sort, pair) for sort in columns for pair in record.get(sort) or ()]
        space = rewrites_of(record)[0].get("space")
        questions = [Question(x["prompt"], spellings(x, x["prompt"], space), edit) for _, x in pairs]

        def read(scores: Scores, before: Scores | None = None) -> dict[str, Any]:
            measured: dict[str, Any] = {}
            for (sort, _), answers in zip(pairs, scores, strict=True):
                measured.setdefault(f"{sort}_probs", []).append({"target": answers[0].nll})
                measured.setdefault(f"{sort}_correct", []).append(max(answer.share for answer in answers))
            if kept is not None and before:
                said = [(now[0].said, then[0].said) for now, then in zip(scores, before, strict=True)]
                same = [[a == b for a, b in zip(*both, strict=True)] for both in said if all(both)]
                measured |= {f"{kept[0]}_correct": [sum(each) / len(each) for each in same]} if same else {}
            return measured

        return questions, read

    return Metric(
        (*columns.values(), *(kept or ())[1:]), order, shares({**columns, **dict([kept] if kept else [])}), ask
    )
