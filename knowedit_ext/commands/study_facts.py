"""`knowedit study`: what edits do to attention and to the statement turned round; severed paths; pairs for people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import knowedit_ext as ke

from .numbers import noise_of
from .options import (
    ContextSeed,
    Device,
    Dtype,
    Html,
    Limit,
    ModelName,
    MomentsFolder,
    choice,
    data_of,
    data_to_read,
    folder_to_read,
    load,
    read_by,
)
from .running import say
from .study_inputs import Data, GivenParams, Labels, Out, SkipBad, inputs, tell

Facts = Annotated[int, typer.Option(min=1, help="Only the first N.")]


def attention(
    model: ModelName,
    out: Out,
    method: Labels,
    params: GivenParams = None,
    data: Data = None,
    moments: MomentsFolder = None,
    facts: Facts = 50,
    seed: ContextSeed = 0,
    skip_bad: SkipBad = False,
    html: Html = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """How each head looks from the last token at the subject, before and after an edit."""
    given = inputs(model, data, moments, device, dtype, method, params)
    options = dict(facts=facts, seed=seed, skip_bad=skip_bad, progress=True)
    return tell(ke.studies.attention(given.model, given.records, method, out, **given.options(), **options), out, html)


def reversal(
    model: ModelName,
    out: Out,
    method: Labels,
    params: GivenParams = None,
    data: Data = None,
    moments: MomentsFolder = None,
    facts: Facts = 100,
    candidates: Annotated[int, typer.Option(min=2, help="Subjects that are compared, the edited one with them.")] = 50,
    seed: ContextSeed = 0,
    skip_bad: SkipBad = False,
    html: Html = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """Is an edit known the other way round, from the object to the subject?"""
    given = inputs(model, data, moments, device, dtype, method, params)
    options = dict(facts=facts, candidates=candidates, seed=seed, skip_bad=skip_bad, progress=True)
    return tell(ke.studies.reversal(given.model, given.records, method, out, **given.options(), **options), out, html)


def severed(
    model: ModelName,
    out: Out,
    data: Annotated[Path | None, data_to_read("JSON in the known_1000 format")] = None,
    limit: Limit = None,
    samples: Annotated[int, typer.Option(min=1, help="Noise draws.")] = 10,
    noise: Annotated[str, read_by(noise_of, '"s3", or a number.')] = "s3",
    seed: ContextSeed = 1,
    compat: Annotated[
        str | None, choice("compat", ("reference",), '"reference": the published code\'s quirks too.')
    ] = None,
    group: Annotated[int, typer.Option(min=1, help="Facts computed together.")] = 8,
    html: Html = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """What is left of a restored state's effect without the MLPs, or the attention, of its token."""
    facts = data_of(model, data)
    options = dict(samples=samples, noise=noise_of(noise), seed=seed, compat=compat, group=group, progress=True)
    return tell(ke.studies.severed(load(model, device, dtype), facts, out, limit=limit, **options), out, html)


def pairs(
    out: Out,
    first: Annotated[Path | None, folder_to_read("Evaluation of a method, with generated texts.")] = None,
    second: Annotated[Path | None, folder_to_read("Evaluation of the other, of the same records.")] = None,
    rated: Annotated[list[Path] | None, typer.Option(help="A filled copy of pairs.csv; may be repeated.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Facts at most.")] = 50,
    seed: ContextSeed = 0,
) -> dict[str, Any]:
    """Blinded pairs of texts for people to judge (--first, --second), and what they said (--rated)."""
    if rated:
        if first is not None or second is not None:
            raise ValueError("--rated reads what was written before: leave --first and --second out")
        study = ke.studies.read_pairs(out, rated)
        study.save(out / "judged")
        say(study.table())
        return study.to_dict()
    if first is None or second is None:
        raise ValueError("give --first and --second to write pairs, or --rated to read them back")
    names = [folder.name or str(folder) for folder in (first.resolve(), second.resolve())]
    if names[0] == names[1]:
        names = [str(first), str(second)]
    ke.studies.export_pairs(dict(zip(names, (first, second), strict=True)), out, count=count, seed=seed)
    say(out / "pairs.html")
    return {"file": out / "pairs.html"}
