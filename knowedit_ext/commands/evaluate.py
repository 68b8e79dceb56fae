"""`knowedit evaluate`: the table of one method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checks import StudyCompat, as_type
from ..editing.methods import METHODS
from ..editing.problems import PROBLEMS
from ..evaluation.command import NONE, run
from .options import (
    ContextSeed,
    Device,
    Dtype,
    Limit,
    MaxRows,
    ModelName,
    MomentsFolder,
    Params,
    file_to_read,
    folder_to_fill,
    load,
    number_or_rule,
)


def evaluate(
    model: ModelName,
    out: Annotated[
        Path,
        folder_to_fill("Folder for cases and report; a run that was killed goes on there."),
    ],
    data: Annotated[
        Path | None, file_to_read("JSON of CounterFact (also the flat schema) or zsRE; default: the world's facts.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"{', '.join((NONE, *METHODS))}.")] = NONE,
    params: Params = "",
    moments: MomentsFolder = None,
    num_edits: Annotated[int | None, typer.Option(help="Facts edited at once; default: memit all, others 1.")] = None,
    limit: Limit = None,
    snippets: Annotated[Path | None, file_to_read("attribute_snippets.json, for consistency.")] = None,
    tfidf: Annotated[tuple[Path, Path] | None, typer.Option(help="idf.npy and tfidf_vocab.json.")] = None,
    zsre_target: Annotated[
        str, typer.Option(help='zsRE: edit to the "answer", as published, or to the false "alt", for portability.')
    ] = "answer",
    zsre_language: Annotated[
        str | None, typer.Option(help='zsRE that is there in several languages: which to take ("zh").')
    ] = None,
    generation: Annotated[bool, typer.Option(help="Fluency and consistency of generated text.")] = True,
    baseline: Annotated[bool, typer.Option(help="Also measure the unedited model.")] = True,
    skip_bad: Annotated[bool, typer.Option(help="Leave bad records out, and count them.")] = False,
    problem: Annotated[str | None, typer.Option(help=f"What to make of each record: {', '.join(PROBLEMS)}.")] = None,
    noise: Annotated[str, typer.Option(help='Of the subject, for --problem: "s3", or a number.')] = "s3",
    compat: Annotated[
        str | None, typer.Option(help='"reference", "hase": the quirks of the published code, or of Hase et al., too.')
    ] = None,
    seed: ContextSeed = 0,
    max_rows: MaxRows = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Edit facts and measure the edits: the papers' table for one method; runs under torchrun too."""
    as_type("compat", compat, StudyCompat)  # before anything is loaded
    choices = dict(method=method, params=params, moments=moments, num_edits=num_edits, seed=seed)
    choices |= dict(problem=problem, noise=number_or_rule(noise))
    texts = dict(generation=generation, snippets=snippets, tfidf=tfidf)
    chosen = dict(limit=limit, zsre_target=zsre_target, zsre_language=zsre_language, skip_bad=skip_bad)
    asked = dict(baseline=baseline, compat=compat, max_rows=max_rows)
    run(lambda: load(model, device, dtype), model == "world", data, out, choices, texts, chosen, asked, typer.echo)
