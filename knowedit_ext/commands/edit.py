"""`knowedit edit`: compute an edit and save it, or show a saved one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

import knowedit_ext as ke

from ..datasets.records import read_records
from ..editing.methods import METHODS, method_of
from .options import (
    ContextSeed,
    Device,
    Dtype,
    Limit,
    MomentsFolder,
    Params,
    file_to_read,
    file_to_write,
    folder_to_fill,
    load,
    meaningless,
)


def edit(
    model: Annotated[str | None, typer.Argument(help='Hub name or folder; "world": the built-in one.')] = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "memit",
    requests: Annotated[Path | None, file_to_read("JSON list of requests or CounterFact records.")] = None,
    moments: MomentsFolder = None,
    params: Params = "",
    out: Annotated[Path | None, file_to_write("Where the edit goes (.safetensors).")] = None,
    show: Annotated[Path | None, file_to_read("Print what a saved edit holds, and do nothing else.")] = None,
    limit: Limit = None,
    seed: ContextSeed = 0,
    store: Annotated[Path | None, folder_to_fill("Folder for values; a run that was killed goes on there.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compute an edit and save it, or show a saved one; with --store under torchrun too."""
    given = {"MODEL": model, "--requests": requests, "--out": out, "--params": params or None}
    if show is not None:
        meaningless(given | {"--moments": moments, "--limit": limit, "--store": store}, "--show FILE does nothing else")
        typer.echo(ke.Edit.load(show).summary())
        return
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing (or give --show FILE)")
    chosen = method_of(method)
    if store is not None and not chosen.takes("store"):
        keep = ", ".join(name for name, each in METHODS.items() if each.takes("store"))
        raise ValueError(f"--store: {method} keeps no values; {keep} do")
    if store is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("several ranks share their values through a folder: give --store DIR")
    edit_requests = [ke.EditRequest.of(record) for record in read_records(requests)[:limit]]
    if chosen.single and len(edit_requests) != 1:
        raise ValueError(
            f"{method} edits one fact at a time, '{requests}' has {len(edit_requests)}: use --limit 1 or memit"
        )
    settings = chosen.params_of(params)
    options = dict(seed=seed, progress=True, store=store, moments=None if moments is None else ke.Moments.load(moments))
    taken = {option: value for option, value in options.items() if chosen.takes(option)}
    made = ke.edit(load(model, device, dtype), edit_requests, method, params=settings, **taken)
    if int(os.environ.get("RANK", 0)):
        return
    made.save(out)
    typer.echo(made.summary())
    typer.echo(str(out))
