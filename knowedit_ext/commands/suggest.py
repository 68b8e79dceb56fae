"""`knowedit suggest`: which layers, which settings?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import knowedit_ext as ke

from ..documents import read_json
from ..world.store import WORLD, load_world
from .names import METHOD_NAMES, check_method
from .options import (
    WORLD_DATA,
    ContextSeed,
    Device,
    Dtype,
    Html,
    ModelName,
    MomentsFolder,
    Params,
    data_of,
    file_to_read,
    load,
    positive,
    preset_or,
)
from .running import say
from .study_inputs import Data, Out, SkipBad


def suggest(
    model: ModelName,
    out: Out,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHOD_NAMES)}.")] = "memit",
    data: Data = None,
    moments: MomentsFolder = None,
    params: Params = "",
    facts: Annotated[Path | None, file_to_read("Facts to trace (known_1000's format); default: the records'.")] = None,
    limit: Annotated[int, typer.Option(min=2, help="Only the first N records; half of them are held out.")] = 128,
    minutes: Annotated[float, positive("--minutes", "So many draws as fit into this.")] = 60.0,
    draws: Annotated[int | None, typer.Option(min=0, help="So many settings drawn, instead of --minutes.")] = None,
    first: Annotated[int, typer.Option(min=1, help="Records of the first round.")] = 8,
    variants: Annotated[int, typer.Option(min=1, help="Candidates a setting: windows and weights.")] = 4,
    space: Annotated[Path | None, file_to_read("JSON {parameter: [values to try]}, instead of ours.")] = None,
    each: Annotated[bool, typer.Option("--each", help="An edit of each record, not one of all.")] = False,
    seed: ContextSeed = 0,
    skip_bad: SkipBad = False,
    html: Html = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """Search the layers and settings that edit this model best; `params.json` in the folder goes to --params."""
    check_method(method)
    source = data_of(model, data)
    given = None if space is None else read_json(space)
    from ..editing.methods import method_of
    from ..studies.suggestion import PARAMS

    chosen, preset = method_of(method), preset_or(params, method, model)
    start = chosen.params_of(preset) if preset else None
    held = None if moments is None else ke.Moments.load(moments)
    loaded = load(model, device, dtype)
    uses = chosen.takes("moments") if start is None else chosen.uses_moments(start)
    if held is None and uses and model == WORLD and source == WORLD_DATA:
        held = ke.collect_moments(loaded, load_world().statements(), list(range(loaded.num_layers)))
    asked = dict(limit=limit, minutes=minutes, draws=draws, first=first, variants=variants, seed=seed)
    found = ke.suggest(
        loaded,
        method,
        facts,
        records=source,
        moments=held,
        params=start,
        space=given,
        out=out,
        together=False if each else None,
        skip_bad=skip_bad,
        progress=True,
        **asked,
    )
    say(found.table())
    say(out / PARAMS)
    if html is not None:
        found.to_html(html)
        say(html)
    return found.to_dict()
