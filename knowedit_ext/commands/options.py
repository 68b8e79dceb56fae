"""What several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

import knowedit_ext as ke

from ..world import load_world

Device = Annotated[str | None, typer.Option(help='Where to run, e.g. "cpu" or "cuda".')]
Dtype = Annotated[str | None, typer.Option(help='e.g. "float32", "bfloat16"; default: as the checkpoint says.')]


def load(model: str, device: str | None, dtype: str | None) -> ke.EditableModel:
    """The model of a command line: "world" is the built-in one, in exact float32 unless asked otherwise."""
    if model == "world":
        return ke.load_model(load_world().folder, device=device, dtype=dtype or "float32")
    return ke.load_model(model, device=device, dtype=dtype)
