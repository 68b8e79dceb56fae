"""`knowedit apply`: a saved edit as a model of its own, or as a LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import knowedit_ext as ke

from .options import Device, Dtype, Edits, ModelName, folder_to_fill, load
from .running import say


def apply(
    model: ModelName,
    edit: Edits,
    out: Annotated[Path, folder_to_fill("New folder for what is made.")],
    kind: Annotated[
        Literal["model", "lora"],
        typer.Option("--as", help="The whole edited model (safetensors, tokenizer), or a LoRA adapter for `peft`."),
    ] = "model",
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """Write the edited model as a Hugging Face folder, or the edit as a LoRA adapter."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: the folder is not empty, and what it holds would be mixed up with this")
    made = saved(edit)
    loaded = load(model, device, dtype)
    from ..editing.folder import save_edited

    with made.applied(loaded):  # where it is another model's edit, that is said here
        if kind == "lora":
            made.to_peft(out)
        else:
            save_edited(loaded, out)
    say(out)
    return {"folder": out, "requests": made.requests}


def saved(files: list[Path]) -> ke.Edit:
    """The edit of a file, or the sum of those of several."""
    edits = [ke.Edit.load(file) for file in files]
    return edits[0] if len(edits) == 1 else ke.Edit.merge(edits)
