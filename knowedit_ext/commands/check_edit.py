"""`knowedit check-edit`: is a saved edit safe?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import knowedit_ext as ke

from ..world.store import WORLD, load_world
from .options import WORLD_DATA, Device, Dtype, ModelName, data_to_read, file_to_read, file_to_write, load
from .running import Ended, say

FAILED = 1
READ = 200  # texts, of a longer file


def check_edit(
    model: ModelName,
    edit: Annotated[Path, file_to_read("A saved edit (.safetensors).")],
    data: Annotated[Path | None, data_to_read("CounterFact records of its requests: neighbours, paraphrases")] = None,
    texts: Annotated[
        Path | None, file_to_read(f"Plain text, {READ} lines of it, for the perplexity; default: texts of ours.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Only the first N requests.")] = 100,
    out: Annotated[Path | None, file_to_write("The result as .json.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """Efficacy, neighbourhood, perplexity and norm growth of an edit: a traffic light with reasons; red ends with 1."""
    made = ke.Edit.load(edit)
    from ..moments.corpora import open_corpus
    from ..runs.files import write_json
    from ..studies.bystanders import TEXTS
    from ..studies.check_edit import RED

    loaded = load(model, device, dtype)
    plain = TEXTS
    if texts is not None:
        corpus = open_corpus(texts, READ)
        plain = [corpus[n] for n in range(len(corpus))]
    elif model == WORLD:
        plain = load_world().fillers()
    records = WORLD_DATA if model == WORLD and data is None else data
    found = ke.check_edit(loaded, made, records, texts=plain, limit=limit)
    if out is not None:
        write_json(out, found.to_dict())
    say(found.table())
    if found.light == RED:
        raise Ended(FAILED, found.to_dict())
    return found.to_dict()
