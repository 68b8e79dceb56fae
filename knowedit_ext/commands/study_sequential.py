"""`knowedit study`: what methods do over many edits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import knowedit_ext as ke

from ..world.store import WORLD, load_world
from .ability import TaskNames, TasksFolder
from .names import check_line
from .options import (
    WORLD_DATA,
    Device,
    Dtype,
    Html,
    ModelName,
    MomentsFolder,
    data_of,
    data_to_read,
    folder_to_fill,
    load,
    read_by,
)
from .study_inputs import Data, GivenParams, params_by_method, tell, world_moments


def sequential(
    model: ModelName,
    out: Annotated[Path, folder_to_fill("Folder; a study that was killed goes on there, at its batch.")],
    method: Annotated[
        list[str],
        read_by(check_line, 'METHOD[+history][:parameter=value,...], e.g. "memit+history:mu=1"; may be repeated.'),
    ],
    params: GivenParams = None,
    data: Data = None,
    untouched_data: Annotated[
        Path | None, data_to_read("Facts that are not edited; default: the records behind the edited ones")
    ] = None,
    moments: MomentsFolder = None,
    edits: Annotated[int | None, typer.Option(min=1, help="How many in all; default: all records.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Facts edited at once.")] = 10,
    every: Annotated[int, typer.Option(min=1, help="Batches from one look to the next.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Orders of the facts: 0 .. SEEDS - 1.")] = 1,
    first: Annotated[int, typer.Option(min=1, help="The first edits, looked at by themselves.")] = 50,
    untouched: Annotated[int, typer.Option(min=0, help="How many untouched facts.")] = 100,
    neighbours: Annotated[int | None, typer.Option(min=1, help="At most so many neighbours a record.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text for the perplexity (file or folder).")] = None,
    max_texts: Annotated[int | None, typer.Option(min=1, help="Only the first N texts of it.")] = None,
    task: TaskNames = None,
    tasks_folder: TasksFolder = None,
    tasks_limit: Annotated[int | None, typer.Option(min=1, help="Of each task only the first N questions.")] = None,
    html: Html = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """Batch after batch on one model: what is left of the first edits, and of all else?

    The same command started several times shares methods and seeds among the processes.
    """
    source, world = data_of(model, data), model == WORLD
    chosen = params_by_method(params or ([WORLD] if world else []))
    from ..moments.corpora import open_corpus
    from ..studies import sequential as run_sequential
    from ..studies.treatment import treatments

    lines = treatments(method, *chosen)
    held = None if moments is None else ke.Moments.load(moments)
    texts = None
    if text is not None:
        corpus = open_corpus(text, max_texts)
        texts = [corpus[n] for n in range(len(corpus))]
    elif world:
        texts = load_world().fillers()[:max_texts]
    loaded = load(model, device, dtype)
    if held is None and world and source == WORLD_DATA:
        held = world_moments(loaded, lines)
    study = run_sequential(
        loaded,
        source,
        method,
        out,
        params=chosen[0],
        params_of=chosen[1],
        moments=held,
        edits=edits,
        batch=batch,
        every=every,
        seeds=list(range(seeds)),
        first=first,
        untouched=untouched,
        untouched_records=untouched_data,
        neighbours=neighbours,
        text=texts,
        tasks=task or (),
        tasks_folder=tasks_folder,
        tasks_limit=tasks_limit,
        progress=True,
    )
    return tell(study, out, html)
