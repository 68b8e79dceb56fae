"""`knowedit check-edit`: is a saved edit safe?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import knowedit_ext as ke

from ..moments.corpora import open_corpus
from ..runs.files import write_json
from ..studies.bystanders import TEXTS
from ..studies.check_edit import RED
from ..world import load_world
from .options import Device, Dtype, ModelName, file_to_read, file_to_write, load

FAILED = 1
READ = 200  # texts, of a longer file


def check_edit(
    model: ModelName,
    edit: Annotated[Path, file_to_read("A saved edit (.safetensors).")],
    data: Annotated[Path | None, file_to_read("CounterFact records of its requests: neighbours, paraphrases.")] = None,
    texts: Annotated[
        Path | None, file_to_read(f"Plain text, {READ} lines of it, for the perplexity; default: texts of ours.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Only the first N requests.")] = 100,
    out: Annotated[Path | None, file_to_write("The result as .json.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Efficacy, neighbourhood, perplexity and norm growth of an edit: a traffic light with reasons; red ends with 1."""
    made = ke.Edit.load(edit)
    loaded = load(model, device, dtype)
    own = model == "world"
    records = load_world().records() if own and data is None else data
    plain = TEXTS
    if texts is not None:
        corpus = open_corpus(texts, READ)
        plain = [corpus[n] for n in range(len(corpus))]
    elif own:
        plain = load_world().fillers()
    found = ke.check_edit(loaded, made, records, texts=plain, limit=limit)
    if out is not None:
        write_json(out, found.to_dict())
    typer.echo(found.table())
    if found.light == RED:
        raise typer.Exit(FAILED)
