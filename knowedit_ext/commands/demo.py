"""`knowedit demo`: trace and edit in the built-in world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import folder_to_fill
from .running import say


def demo(
    out: Annotated[Path, folder_to_fill("Folder for what the demo makes.")] = Path("demo_out"),
    edits: Annotated[int, typer.Option(min=0, help="Facts to edit by MEMIT, after three by ROME; 0: none.")] = 100,
) -> dict[str, Any]:
    """Trace facts of the built-in world, show where they are kept, and edit some."""
    from ..demo import run

    return {"files": run(out, say, edits=edits)}
