"""`knowedit generate`: what a model says, before and after an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .apply import saved
from .options import Device, Dtype, ModelName, file_to_read, load
from .running import say


def generate(
    model: ModelName,
    prompt: Annotated[list[str], typer.Option(help="A text to go on from; may be repeated.")],
    edit: Annotated[list[Path] | None, file_to_read("A saved edit (.safetensors); may be repeated: their sum.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many, each the likeliest.")] = 20,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """The likeliest continuation of prompts, before and after an edit."""
    made = saved(edit) if edit else None
    loaded = load(model, device, dtype)
    from ..evaluation.written import written

    before = written(loaded, prompt, tokens)
    after = None
    if made is not None:
        with made.applied(loaded):
            after = written(loaded, prompt, tokens)
    for n, text in enumerate(prompt):
        say(text)
        say(f"  {'before' if after else 'says'}: {before[n]!r}")
        if after:
            say(f"  after:  {after[n]!r}")
    return {"prompts": prompt, "before": before, "after": after}
