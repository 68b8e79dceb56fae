"""What the commands of several studies take: facts, methods with their parameters, moments, texts to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import knowedit_ext as ke

from ..world.store import WORLD, load_world
from .names import METHOD_NAMES, check_line, check_method
from .options import WORLD_DATA, data_of, data_to_read, file_to_read, folder_to_fill, load, read_by
from .running import say

if TYPE_CHECKING:
    from ..studies import Findings, Treatment

Out = Annotated[Path, folder_to_fill("Folder; a study that was killed goes on there.")]
Labels = Annotated[
    list[str],
    read_by(check_line, 'METHOD[:parameter=value,...], e.g. "memit:layers=3-5"; may be repeated.', "--method"),
]
GivenParams = Annotated[
    list[str] | None,
    typer.Option(help="A preset or a file for all methods, or METHOD=PRESET-OR-FILE for one; may be repeated."),
]
Data = Annotated[Path | None, data_to_read("JSON of CounterFact (also the flat schema)")]
Seeds = Annotated[int, typer.Option(min=1, help="Seeds 0 .. SEEDS - 1.")]
SkipBad = Annotated[bool, typer.Option(help="Leave out records that cannot be edited, or not with the others.")]
Generation = Annotated[bool, typer.Option(help="Also fluency (GE), and with snippets consistency (RS).")]
Snippets = Annotated[Path | None, file_to_read("attribute_snippets.json, for consistency.")]


@dataclass
class Inputs:
    """params, params_of: of all methods, and of single ones. records: a file, or the world's."""

    model: ke.EditableModel
    records: Path
    params: str | None
    params_of: dict[str, Any]
    moments: ke.Moments | None

    def options(self) -> dict[str, Any]:
        return {"params": self.params, "params_of": self.params_of, "moments": self.moments}


def inputs(
    model: str,
    data: Path | None,
    moments: Path | None,
    device: str | None,
    dtype: str | None,
    labels: Sequence[str],
    params: Sequence[str] | None,
    every_layer: bool = False,
) -> Inputs:
    """All is checked before the model is loaded. every_layer: moments of all are needed, not of the methods' own."""
    source, world = data_of(model, data), model == WORLD
    shared, by_method = params_by_method(params or ([WORLD] if world else []))
    from ..studies.treatment import treatments

    lines = treatments(labels, shared, by_method)
    held = None if moments is None else ke.Moments.load(moments)
    loaded = load(model, device, dtype)
    if held is None and world and source == WORLD_DATA:
        held = world_moments(loaded, lines, every_layer)
    return Inputs(loaded, source, shared, by_method, held)


def world_moments(model: ke.EditableModel, lines: Sequence[Treatment], every_layer: bool = False) -> ke.Moments | None:
    """Of the layers that the methods edit, or of all."""
    used = [line for line in lines if line.uses_moments]
    own = {n for line in used for n in line.params.layers}
    wanted = list(range(model.num_layers)) if used and every_layer else sorted(own)
    if not wanted:
        return None
    from ..world import moments

    return moments.collect(model, wanted)


def params_by_method(given: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """(for all methods, {method: for it})"""
    shared, by_method = None, {}
    for text in given:
        name, equals, value = text.partition("=")
        if equals:
            check_method(name)
            by_method[name] = value
        elif shared is not None:
            raise ValueError(f"--params {shared} and {text} are both for all methods ({', '.join(METHOD_NAMES)})")
        else:
            shared = text
    return shared, by_method


def compared_with(world: bool, generation: bool, snippets: Path | None) -> Any:
    """The snippets of a study that generates."""
    if snippets is not None and not generation:
        raise ValueError("--snippets are for the consistency of generated texts: give --generation too")
    if not generation:
        return None
    from ..datasets import load_snippets

    source = load_world().snippets() if world and snippets is None else snippets
    return None if source is None else load_snippets(source)


def tell(study: Findings, out: Path, html: Path | None = None, page: str = "study.md") -> dict[str, Any]:
    say(study.table() if study.rows or study.notes else "all of it is being computed by other processes")
    say(out / page)
    if html is not None:
        study.to_html(html)
        say(html)
    return {**study.to_dict(), "file": out / page}
