"""`knowedit evaluate`: the table of one method."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .apply import saved
from .names import COMPATS, METHOD_NAMES, PROBLEM_NAMES, check_method
from .numbers import noise_of
from .options import (
    WORLD_DATA,
    ContextSeed,
    Device,
    Dtype,
    Html,
    Limit,
    MaxRows,
    ModelName,
    MomentsFolder,
    Params,
    ValueStore,
    choice,
    data_of,
    data_to_read,
    file_to_read,
    folder_to_fill,
    load,
    meaningless,
    positive,
    preset_or,
    read_by,
)
from .running import say

NONE = "none"  # no method: the model as it is


def evaluate(
    model: ModelName,
    out: Annotated[
        Path,
        folder_to_fill("Folder for cases and report; a run that was killed goes on there."),
    ],
    data: Annotated[
        Path | None,
        data_to_read("JSON (or JSON lines) of CounterFact, zsRE, KnowEdit, MQuAKE, RippleEdits or WikiBigEdit"),
    ] = None,
    method: Annotated[str, typer.Option(help=f"{', '.join((NONE, *METHOD_NAMES))}.")] = NONE,
    edit: Annotated[
        list[Path] | None, file_to_read("A saved edit, in place of a method; of the records those that it is of.")
    ] = None,
    params: Params = "",
    moments: MomentsFolder = None,
    num_edits: Annotated[
        int | None, positive("--num-edits", "Facts edited at once; default: memit all, others 1.")
    ] = None,
    limit: Limit = None,
    snippets: Annotated[Path | None, file_to_read("attribute_snippets.json, for consistency.")] = None,
    tfidf: Annotated[tuple[Path, Path] | None, typer.Option(help="idf.npy and tfidf_vocab.json.")] = None,
    zsre_target: Annotated[
        str,
        choice(
            "zsre_target",
            ("answer", "alt"),
            'zsRE: edit to the "answer", as published, or to the false "alt", for portability.',
        ),
    ] = "answer",
    zsre_language: Annotated[
        str | None, typer.Option(help='zsRE that is there in several languages: which to take ("zh").')
    ] = None,
    generation: Annotated[bool, typer.Option(help="Fluency and consistency of generated text.")] = True,
    baseline: Annotated[bool, typer.Option(help="Also measure the unedited model.")] = True,
    skip_bad: Annotated[bool, typer.Option(help="Leave bad records out, and count them.")] = False,
    problem: Annotated[
        str | None,
        choice("problem", PROBLEM_NAMES, f"What to make of each record: {', '.join(PROBLEM_NAMES)}."),
    ] = None,
    noise: Annotated[str, read_by(noise_of, 'Of the subject, for --problem: "s3", or a number.')] = "s3",
    compat: Annotated[
        str | None,
        choice("compat", COMPATS, '"reference", "hase": the quirks of the published code, or of Hase et al., too.'),
    ] = None,
    html: Html = None,
    seed: ContextSeed = 0,
    store: ValueStore = None,
    max_rows: MaxRows = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any] | None:
    """Edit facts and measure the edits: the papers' table for one method; runs under torchrun too."""
    check_method(method, NONE)
    if edit:
        others = {"--method": method != NONE, "--problem": problem, "--store": store}
        meaningless(others, "--edit has been made already")
    source = data_of(model, data)
    world = source == WORLD_DATA
    params = params if method == NONE else preset_or(params, method, model)
    choices = dict(method=method, params=params, moments=moments, num_edits=num_edits, seed=seed, store=store)
    choices |= dict(problem=problem, noise=noise_of(noise))
    texts = dict(generation=generation, snippets=snippets, tfidf=tfidf)
    chosen = dict(limit=limit, zsre_target=zsre_target, zsre_language=zsre_language, skip_bad=skip_bad)
    asked = dict(baseline=baseline, compat=compat, max_rows=max_rows)
    from ..evaluation.command import run

    choices["edit"] = saved(edit) if edit else None
    loading = (lambda: load(model, device, dtype)), world
    report = run(*loading, None if world else source, out, choices, texts, chosen, asked, say)
    if html is not None and not int(os.environ.get("RANK", 0)):
        report.to_html(html)
        say(html)
    return {**report.to_dict(), "file": out / "report.md"}
