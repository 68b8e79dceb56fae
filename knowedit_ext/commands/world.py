"""`knowedit world`: the built-in world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import LARGEST_SEED, folder_to_fill
from .running import say


def train(
    out: Annotated[Path, folder_to_fill("Folder for the checkpoint.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default: the shipped recipe.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of world and training.")] = 0,
) -> dict[str, Any]:
    """Generate the world and train its model on the CPU (the recipe of the shipped checkpoint)."""
    from ..world.train import train as train_world

    folder = train_world(out, seed=seed, **({} if steps is None else {"steps": steps}))
    say(folder)
    return {"folder": folder}
