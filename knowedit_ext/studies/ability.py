"""General ability on tasks that the user names, by the `lm-eval` package (extra `lm-eval`)."""

from __future__ import annotations

import copy
import difflib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checks import Count, Natural, quoted, typed
from ..editing.edit import Edit
from ..extras import require
from ..model.hooks import resting
from ..model.load import EditableModel
from ..runs.files import write_json
from .perplexity import predicted, text_perplexity

ERROR = "_stderr"
PERPLEXITY = "perplexity"

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Tasks:
    """names: of lm-eval's tasks and groups, or of those in YAML files in `folder` (read beside its own; such files may
    name Python of theirs, which then runs). limit: of each task the first so many questions. fewshot: examples shown
    before a question; None: as the task says. batch: questions asked at once."""

    names: tuple[str, ...]
    folder: str | None = None
    limit: int | None = None
    fewshot: int | None = None
    batch: int = 8

    @classmethod
    def of(cls, names: Sequence[str], folder: str | Path | None = None, **options: Any) -> Tasks | None:
        """None without names. MissingExtraError, ValueError for a name that nobody has."""
        if not names:
            return None
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"there is no folder of tasks {quoted(folder)}")
        found = cls(tuple(names), None if folder is None else str(folder), **options)
        known = found.manager().all_tasks
        for name in found.names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 3)
                raise ValueError(f"no task {quoted(name)}" + (f": near to it are {', '.join(near)}" if near else ""))
        return found

    def files(self) -> dict[str, str]:
        """Digests of the files in `folder`: the same names may come to mean other questions."""
        found = [] if self.folder is None else sorted(Path(self.folder).rglob("*"))
        return {str(p.relative_to(self.folder)): sha256(p.read_bytes()).hexdigest() for p in found if p.is_file()}

    def manager(self) -> Any:
        require("lm_eval")
        from lm_eval.tasks import TaskManager

        if self.folder is not None:  # lm-eval's own are thousands of files: not read where they are not asked for
            own = TaskManager(include_path=self.folder, include_defaults=False)
            if set(self.names) <= set(own.all_tasks):
                return own
        return TaskManager(include_path=self.folder)

    def scores(self, model: EditableModel) -> Scores:
        """{task: {metric: value}} of the model as it is; beside a metric its standard error where lm-eval gives one."""
        manager = self.manager()
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with resting(model), _random_state_kept():
            # It gives the tokenizer a padding token.
            asked = HFLM(model.hf, tokenizer=copy.deepcopy(model.tokenizer), batch_size=self.batch)
            options = dict(num_fewshot=self.fewshot, limit=self.limit, task_manager=manager, log_samples=False)
            found = lm_eval.simple_evaluate(asked, tasks=list(self.names), **options)
        return {task: _numbers(metrics) for task, metrics in found["results"].items()}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval names a metric "acc,none", behind the comma the filter of answers."""
    named = {}
    for name, value in metrics.items():
        metric, _, chosen = name.partition(",")
        if isinstance(value, (int, float)) and chosen:
            named[metric if chosen == "none" else f"{metric} ({chosen})"] = float(value)
    return named


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """lm-eval seeds everybody's generators."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@dataclass
class Ability:
    """{task: {metric: value}} before an edit and with it in place (None: no edit was given); a text's perplexity under
    the task "perplexity"."""

    before: Scores
    after: Scores | None

    def __repr__(self) -> str:
        return f"Ability({', '.join(self.before)}; {'before' if self.after is None else 'before and after'})"

    def to_dict(self) -> dict[str, Any]:
        return {"before": self.before, "after": self.after}

    def save(self, path: str | Path) -> None:
        """JSON, atomically."""
        write_json(path, self.to_dict())

    def table(self) -> str:
        """Markdown: a line a metric, with standard errors in brackets."""
        sides = [self.before] if self.after is None else [self.before, self.after]
        head = "| task | metric | before |" + (" after | change |" if self.after else "")
        lines = [head, "|---|---|" + "--:|" * (3 if self.after else 1)]
        for task, metrics in self.before.items():
            for metric in (name for name in metrics if ERROR not in name):
                shown = [_shown(side[task], metric) for side in sides]
                if self.after:
                    shown.append(f"{self.after[task][metric] - metrics[metric]:+.4g}")
                lines.append(f"| {task} | {metric} | {' | '.join(shown)} |")
        return "\n".join(lines) + "\n"


def _shown(metrics: Mapping[str, float], metric: str) -> str:
    name, space, chosen = metric.partition(" ")
    error = metrics.get(f"{name}{ERROR}{space}{chosen}")
    return f"{metrics[metric]:.4g}" + ("" if error is None else f" ({error:.2g})")


@typed
def ability(
    model: EditableModel,
    tasks: Sequence[str] = (),
    edit: Edit | None = None,
    *,
    tasks_folder: str | Path | None = None,
    texts: Sequence[str] | None = None,
    limit: Count | None = None,
    fewshot: Natural | None = None,
    batch: Count = 8,
) -> Ability:
    """What a model can do apart from the edited facts, before an edit and with it.

    tasks: of the `lm-eval` package, by their names (extra `lm-eval`; their data come from where the task says), or of
        your own: YAML files in `tasks_folder`. texts: their perplexity. limit: of each task the first so many
        questions. fewshot: examples shown before each; None: as the task says. batch: questions asked at once.

    The numbers are lm-eval's own. Raises `MissingExtraError` without the package, ValueError for an unknown task,
    before anything is computed; the model is left as it was.
    """
    asked = Tasks.of(tasks, tasks_folder, limit=limit, fewshot=fewshot, batch=batch)
    if asked is None and texts is None:
        raise ValueError("neither tasks nor texts: there is nothing to measure")
    if texts is not None:
        predicted(model, texts)

    def measured() -> Scores:
        own = {} if texts is None else {PERPLEXITY: {PERPLEXITY: text_perplexity(model, texts)}}
        return own | ({} if asked is None else asked.scores(model))

    before = measured()
    if edit is None:
        return Ability(before, None)
    with edit.applied(model):
        return Ability(before, measured())
