"""`knowedit generate`: what a model says, before and after an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import knowedit_ext as ke

from .apply import saved
from .options import Device, Dtype, Html, ModelName, file_to_read, load
from .running import say


def generate(
    model: ModelName,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to go on from; may be repeated. Default: the edit's own prompts.")
    ] = None,
    edit: Annotated[list[Path] | None, file_to_read("A saved edit (.safetensors); may be repeated: their sum.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="A text whose probability is told; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many, each the likeliest.")] = 20,
    html: Html = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """The likeliest continuation of prompts, before and after an edit."""
    if not prompt and not edit:
        raise ValueError("give --prompt, or --edit FILE for the prompts that it is of")
    made = saved(edit) if edit else None
    said = ke.before_after(load(model, device, dtype), made, prompt or None, targets=target or (), tokens=tokens)
    for n, text in enumerate(said.prompts):
        say(text)
        for side, each in (("before" if said.after else "says", said.before), ("after", said.after)):
            if each is not None:
                chances = "".join(f", p({t.strip()}) {p:.3f}" for t, p in each[n].targets.items())
                say(f"  {side + ':':7} {each[n].text!r}{chances}")
    if html is not None:
        said.to_html(html)
        say(html)
    return said.to_dict()
