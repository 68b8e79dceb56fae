"""`knowedit study`: methods over numbers of edits, relations, layers and tokens."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import knowedit_ext as ke

from ..world.store import WORLD
from .names import TOKEN_NAMES, check_line
from .numbers import layers_of, numbers_of, pair_of
from .options import (
    ContextSeed,
    Device,
    Dtype,
    Html,
    ModelName,
    MomentsFolder,
    Params,
    ValueStore,
    choice,
    data_of,
    read_by,
)
from .study_inputs import (
    Data,
    Generation,
    GivenParams,
    Labels,
    Out,
    Seeds,
    SkipBad,
    Snippets,
    compared_with,
    inputs,
    tell,
)

Counts = Annotated[str, read_by(numbers_of, 'Numbers of edits, e.g. "1,10,100"; default: the published grid.')]
Least = Annotated[int, typer.Option(min=1, help="Facts to score for each number: small ones are edited several times.")]


def scaling(
    model: ModelName,
    out: Out,
    method: Labels,
    params: GivenParams = None,
    data: Data = None,
    moments: MomentsFolder = None,
    counts: Counts = "",
    least: Least = 1,
    seeds: Seeds = 1,
    shuffle: Annotated[bool, typer.Option(help="Take the facts in an order of the seed's.")] = False,
    generation: Generation = False,
    snippets: Snippets = None,
    skip_bad: SkipBad = False,
    store: ValueStore = None,
    html: Html = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """1 to 10,000 edits: the scores of all of them, a curve a method (MEMIT, figure 5)."""
    compared = compared_with(model == WORLD, generation, snippets)
    given = inputs(model, data, moments, device, dtype, method, params)
    study = ke.studies.scaling(
        given.model,
        given.records,
        method,
        out,
        **given.options(),
        counts=numbers_of(counts),
        least=least,
        seeds=list(range(seeds)),
        shuffle=shuffle,
        generation=generation,
        snippets=compared,
        skip_bad=skip_bad,
        store=store,
        progress=True,
    )
    return tell(study, out, html)


def layers(
    model: ModelName,
    out: Out,
    method: Annotated[str, read_by(check_line, "METHOD[:parameter=value,...].")] = "memit",
    params: Params = "",
    window: Annotated[
        list[str] | None, read_by(layers_of, 'Layers edited together, e.g. "3-5"; may be repeated; default: see docs.')
    ] = None,
    data: Data = None,
    moments: MomentsFolder = None,
    counts: Counts = "",
    least: Least = 1,
    skip_bad: SkipBad = False,
    html: Html = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """How many layers to edit, and which: the curves of one method with several windows."""
    data_of(model, data)
    chosen = params or (WORLD if model == WORLD else None)
    from ..studies.layers import spelled, windows_of
    from ..studies.treatment import Treatment

    own = Treatment.of(method, chosen, {}).params.layers
    windows = None if window is None else [layers_of(text) for text in window]
    given = inputs(model, data, moments, device, dtype, [method], [chosen] if chosen else None, every_layer=True)
    if windows is None:
        windows = windows_of(own, given.model.num_layers)
        if moments is not None:  # a folder may not have them all
            windows = [one for one in windows if set(one) <= set(given.moments.layers)] or windows
            typer.echo(f"windows: {', '.join(map(spelled, windows))}", err=True)
    study = ke.studies.layers(
        given.model,
        given.records,
        out,
        method=method,
        params=chosen,
        windows=windows,
        moments=given.moments,
        counts=numbers_of(counts),
        least=least,
        skip_bad=skip_bad,
        progress=True,
    )
    return tell(study, out, html)


def categories(
    model: ModelName,
    out: Out,
    method: Labels,
    params: GivenParams = None,
    data: Data = None,
    moments: MomentsFolder = None,
    edits: Annotated[int, typer.Option(min=1, help="Facts of a relation that are edited together.")] = 300,
    relation: Annotated[list[str] | None, typer.Option(help="relation_id; may be repeated; default: all.")] = None,
    seeds: Seeds = 1,
    skip_bad: SkipBad = False,
    html: Html = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """Facts of one relation edited together: which are easy to change (MEMIT, figure 6)?"""
    given = inputs(model, data, moments, device, dtype, method, params)
    options = dict(edits=edits, relations=relation, seeds=list(range(seeds)), skip_bad=skip_bad, progress=True)
    return tell(ke.studies.categories(given.model, given.records, method, out, **given.options(), **options), out, html)


def mixes(
    model: ModelName,
    out: Out,
    method: Labels,
    params: GivenParams = None,
    data: Data = None,
    moments: MomentsFolder = None,
    pair: Annotated[list[str] | None, read_by(pair_of, 'Two relation_ids, "P19+P103"; may be repeated.')] = None,
    counts: Counts = "",
    seeds: Seeds = 1,
    skip_bad: SkipBad = False,
    html: Html = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """Facts of two relations edited together, against each alone (MEMIT, figure 7)."""
    pairs = None if pair is None else [pair_of(text) for text in pair]
    given = inputs(model, data, moments, device, dtype, method, params)
    options = dict(
        pairs=pairs, counts=numbers_of(counts), seeds=list(range(seeds)), skip_bad=skip_bad, progress=True
    )  # fmt: skip
    return tell(ke.studies.mixes(given.model, given.records, method, out, **given.options(), **options), out, html)


def layer_token(
    model: ModelName,
    out: Out,
    method: Annotated[str, read_by(check_line, "rome or r_rome, with parameters if need be.")] = "rome",
    params: Params = "",
    data: Data = None,
    moments: MomentsFolder = None,
    layers: Annotated[str, read_by(layers_of, 'e.g. "0,4,8-11"; default: all.')] = "",
    token: Annotated[
        list[str] | None, choice("token", TOKEN_NAMES, f"{', '.join(TOKEN_NAMES)}; may be repeated.")
    ] = None,
    facts: Annotated[int, typer.Option(min=1, help="Only the first N.")] = 100,
    seed: ContextSeed = 0,
    generation: Generation = False,
    snippets: Snippets = None,
    skip_bad: SkipBad = False,
    html: Html = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """ROME at every layer and token: where does an edit work (ROME, figure 5)?"""
    compared = compared_with(model == WORLD, generation, snippets)
    chosen = params or (WORLD if model == WORLD else None)
    given = inputs(model, data, moments, device, dtype, [method], [chosen] if chosen else None, every_layer=True)
    study = ke.studies.layer_token(
        given.model,
        given.records,
        out,
        method=method,
        params=chosen,
        moments=given.moments,
        layers=layers_of(layers) if layers else None,
        tokens=token or list(TOKEN_NAMES),
        facts=facts,
        seed=seed,
        generation=generation,
        snippets=compared,
        skip_bad=skip_bad,
        progress=True,
    )
    return tell(study, out, html)
