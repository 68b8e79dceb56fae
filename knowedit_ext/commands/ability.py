"""`knowedit ability`: what a model can do apart from the edited facts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import knowedit_ext as ke

from ..world.store import WORLD, load_world
from .options import Device, Dtype, ModelName, file_to_read, file_to_write, load
from .running import say

TaskNames = Annotated[
    list[str] | None, typer.Option("--task", help="A task of lm-eval's, or of --tasks-folder; may be repeated.")
]
TasksFolder = Annotated[
    Path | None, typer.Option(help="Folder of your own tasks (YAML, which may name Python of its own).")
]
TasksLimit = Annotated[int | None, typer.Option("--limit", min=1, help="Of each task only the first N questions.")]


def ability(
    model: ModelName,
    edit: Annotated[Path | None, file_to_read("A saved edit (.safetensors): before, and with it.")] = None,
    task: TaskNames = None,
    tasks_folder: TasksFolder = None,
    limit: TasksLimit = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before a question; default: the task's.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions asked at once.")] = 8,
    text: Annotated[Path | None, typer.Option(help="Text for the perplexity (file or folder).")] = None,
    max_texts: Annotated[int | None, typer.Option(min=1, help="Only the first N texts of it.")] = None,
    out: Annotated[Path | None, file_to_write("The result as .json.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """Perplexity of a text, and tasks of the lm-eval package, before an edit and with it."""
    made = None if edit is None else ke.Edit.load(edit)
    from ..moments.corpora import open_corpus

    texts = None
    if text is not None:
        corpus = open_corpus(text, max_texts)
        texts = [corpus[n] for n in range(len(corpus))]
    elif model == WORLD:
        texts = load_world().fillers()[:max_texts]
    found = ke.ability(
        load(model, device, dtype),
        task or (),
        made,
        tasks_folder=tasks_folder,
        texts=texts,
        limit=limit,
        fewshot=fewshot,
        batch=batch,
    )
    if out is not None:
        found.save(out)
    say(found.table())
    return found.to_dict()
