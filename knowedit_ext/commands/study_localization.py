"""`knowedit study localization`: does localization inform editing?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import knowedit_ext as ke

from ..world.store import WORLD, load_world
from .names import COMPATS, PROBLEM_NAMES, check_edited_by
from .numbers import layers_of, noise_of
from .options import (
    Device,
    Dtype,
    Html,
    ModelName,
    MomentsFolder,
    choice,
    data_of,
    folder_to_fill,
    load,
    read_by,
)
from .study_inputs import Data, params_by_method, tell


def localization(
    model: ModelName,
    out: Annotated[Path, folder_to_fill("Folder; a study that was killed, or is enlarged, goes on there.")],
    data: Data = None,
    moments: MomentsFolder = None,
    problem: Annotated[
        list[str] | None, choice("problem", PROBLEM_NAMES, f"{', '.join(PROBLEM_NAMES)}; may be repeated.")
    ] = None,
    method: Annotated[
        list[str] | None, read_by(check_edited_by, "rome, memit, ft-N (a window of N layers); may be repeated.")
    ] = None,
    layers: Annotated[str, read_by(layers_of, 'Edited layers, e.g. "0,4,8-11"; default: all.')] = "",
    facts: Annotated[int | None, typer.Option(min=1, help="Only the first N facts that the model knows.")] = None,
    params: Annotated[
        list[str] | None,
        typer.Option(help="A preset of all methods, or ft=, rome=, memit=PRESET-OR-FILE; default: as for GPT-J."),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Layers that MEMIT edits.")] = 5,
    noise: Annotated[str, read_by(noise_of, 'Of traces and problems: "s3", or a number.')] = "s3",
    trace_window: Annotated[int, typer.Option(min=1, help="MLP layers restored together.")] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Noise draws of a trace.")] = 10,
    essence: Annotated[bool, typer.Option(help="Also the perplexity of texts about the subject.")] = False,
    compat: Annotated[str | None, choice("compat", COMPATS, '"hase": problems, edits and scores as released.')] = None,
    group: Annotated[int, typer.Option(min=1, help="Facts computed together.")] = 8,
    html: Html = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """Trace every known fact, edit it at every layer by every method for every problem, score, regress.

    The same command started several times shares the work, and so does torchrun.
    Writes one tidy table, the regressions and figures.
    """
    source, world = data_of(model, data), model == WORLD
    shared, by_method = params_by_method(params or ([WORLD] if world else []))
    from ..studies.localization import METHODS
    from ..studies.localization_edits import PUBLISHED

    if unknown := set(by_method) - set(PUBLISHED):
        raise ValueError(f"--params {min(unknown)}=: expected one of {', '.join(PUBLISHED)}")
    held = None if moments is None else ke.Moments.load(moments)
    loaded = load(model, device, dtype)
    if held is None and world:
        held = ke.collect_moments(loaded, load_world().statements(), list(range(loaded.num_layers)))
    results = ke.localization_study(
        loaded,
        source,
        out,
        held,
        problems=problem or list(PROBLEM_NAMES),
        methods=method or list(METHODS),
        layers=layers_of(layers) if layers else None,
        facts=facts,
        params={kind: by_method.get(kind, shared) for kind in PUBLISHED},
        window=window,
        noise=noise_of(noise),
        trace_window=trace_window,
        samples=samples,
        essence=essence,
        compat=compat,
        group=group,
        progress=True,
    )
    return tell(results, out, html)
