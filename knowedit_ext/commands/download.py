"""`knowedit download`: published data files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..datasets import download as fetch
from .options import folder_to_fill


def download(
    name: Annotated[str, typer.Argument(help="counterfact, attribute_snippets, idf or tfidf_vocab.")],
    folder: Annotated[Path | None, folder_to_fill("Where it goes; default: the cache.")] = None,
) -> None:
    """Fetch a published data file, check it, and say where it is."""
    typer.echo(str(fetch(name, folder)))
