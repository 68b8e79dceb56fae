"""`knowedit demo`: trace and edit in the built-in world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..demo import run
from .options import folder_to_fill


def demo(
    out: Annotated[Path, folder_to_fill("Folder for what the demo makes.")] = Path("demo_out"),
    edits: Annotated[int, typer.Option(min=0, help="Facts to edit by MEMIT, after three by ROME; 0: none.")] = 100,
) -> None:
    """Trace facts of the built-in world, show where they are kept, and edit some."""
    run(out, typer.echo, edits=edits)
