"""General ability: perplexity of a text, and tasks of the lm-evaluation-harness on the model as it stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.metrics.essence import perplexity
from ..extras import require
from ..model.load import EditableModel
from ..model.tokens import encode_all

STRETCH = 128  # tokens of a text that are read together


def text_perplexity(model: EditableModel, texts: Sequence[str], max_rows: int | None = None) -> float:
    """exp of the mean negative log-probability of all tokens that are predicted, all but a text's first; of each text
    the first 128 tokens count."""
    most = model.modules.max_positions
    length = STRETCH if most is None else min(STRETCH, most)
    counts = [len(ids) - 1 for ids in encode_all(model, texts, length)]
    read = [(text, count) for text, count in zip(texts, counts, strict=True) if count > 0]
    if not read:
        raise ValueError("no text has two tokens: there is nothing to predict in it")
    values = perplexity(model, [text for text, _ in read], max_length=length, max_rows=max_rows)
    total = sum(math.log(value) * count for value, (_, count) in zip(values, read, strict=True))
    return math.exp(total / sum(count for _, count in read))


def check_tasks(tasks: Sequence[str]) -> None:
    """`MissingExtraError` where tasks are asked for and lm-eval is not there; ValueError for a file that is not."""
    if tasks:
        require("lm_eval")
    for task in tasks:
        if Path(task).suffix in (".yaml", ".yml") and not Path(task).is_file():
            raise ValueError(f"task '{task}': there is no such file")


def general_ability(
    model: EditableModel, tasks: Sequence[str], limit: int | None = None
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of lm-eval's `simple_evaluate` on the model with the edits in force.

    tasks: names that lm-eval knows, or YAML files of tasks. limit: examples of each. Needs the extra `lm-eval`.
    Raises ValueError for a task that is not there.
    """
    check_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    named: list[Any] = []
    for task in tasks:
        if Path(task).suffix in (".yaml", ".yml"):
            named.append(_from_file(task))
        elif task in manager.all_tasks:
            named.append(task)
        else:
            raise ValueError(f"lm-eval knows no task '{task}' (lm-eval ls tasks): expected a name or a YAML file")
    harness = HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=8)
    run = simple_evaluate(harness, tasks=named, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False)
    return {name: _numbers(values) for name, values in run["results"].items()}


def _from_file(path: str) -> dict[str, Any]:
    from lm_eval.utils import load_yaml_config

    return load_yaml_config(path)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """ "acc,none" -> "acc"; standard errors, counts and names are left out."""
    return {
        key.partition(",")[0]: float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and "stderr" not in key and key != "sample_len"
    }
