"""`knowedit edit`: compute an edit and save it, or show a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import knowedit_ext as ke

from ..datasets.records import read_records
from ..evaluation.methods import PARAMS, params_of
from .options import Device, Dtype, load


def edit(
    model: Annotated[str | None, typer.Argument(help='Hub name or folder; "world": the built-in one.')] = None,
    method: Annotated[str, typer.Option(help="rome (one request), memit, ft or ft-l.")] = "memit",
    requests: Annotated[Path | None, typer.Option(help="JSON list of requests or CounterFact records.")] = None,
    moments: Annotated[Path | None, typer.Option(help="Folder made by `knowedit moments`.")] = None,
    params: Annotated[str, typer.Option(help='A preset, e.g. "gpt2-xl", or a JSON file with the published keys.')] = "",
    out: Annotated[Path | None, typer.Option(help="Where the edit goes (.safetensors).")] = None,
    show: Annotated[Path | None, typer.Option(help="Print what a saved edit holds, and do nothing else.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N requests.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the generated contexts.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compute an edit and save it, or show a saved one."""
    if show is not None:
        typer.echo(ke.Edit.load(show).summary())
        return
    given = {"MODEL": model, "--requests": requests, "--out": out, "--params": params or None}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing (or give --show FILE)")
    if method not in PARAMS:
        raise ValueError(f"unknown method '{method}': expected one of {', '.join(PARAMS)}")
    found = [ke.EditRequest.of(record) for record in read_records(requests)[:limit]]
    chosen = params_of(method, params)
    stored = None if moments is None else ke.Moments.load(moments)
    loaded = load(model, device, dtype)
    if method == "rome":
        if len(found) != 1:
            raise ValueError(f"rome edits one fact at a time, '{requests}' has {len(found)}: use --limit 1 or memit")
        made = ke.rome(loaded, found[0], chosen, stored, seed=seed)
    elif method == "memit":
        made = ke.memit(loaded, found, chosen, stored, seed=seed, progress=True)
    else:
        made = ke.finetune(loaded, found, chosen, progress=True)
    made.save(out)
    typer.echo(made.summary())
    typer.echo(str(out))
