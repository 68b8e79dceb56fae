"""`knowedit explore`: trace and edit by hand, in the browser."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import knowedit_ext as ke

from ..world.store import WORLD
from .names import METHOD_NAMES, check_method
from .options import Device, Dtype, ModelName, MomentsFolder, Params, load, preset_or
from .running import say
from .study_inputs import world_moments


def explore(
    model: ModelName,
    method: Annotated[str, typer.Option(help=f"How edits are made: {', '.join(METHOD_NAMES)}.")] = "rome",
    params: Params = "",
    moments: MomentsFolder = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of 127.0.0.1; nobody else can reach it.")] = 7860,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any]:
    """Trace a prompt, try an edit, keep or revert it, save what was kept: a page on this machine, until Ctrl-C."""
    check_method(method)
    params = preset_or(params, method, model)
    if not params:
        raise ValueError(f"--params missing: '{model}' has no preset of {method}")
    from ..editing.methods import method_of
    from ..explore.app import LOOPBACK, serve
    from ..explore.session import Session
    from ..extras import require
    from ..studies.treatment import Treatment

    chosen = method_of(method)
    line = Treatment(method, chosen, chosen.params_of(params), history=False)
    require("gradio")
    held = None if moments is None else ke.Moments.load(moments)
    loaded = load(model, device, dtype)
    if held is None and model == WORLD:
        held = world_moments(loaded, [line])
    session = Session(loaded, method, line.params, held)
    address = f"http://{LOOPBACK}:{port}"
    say(f"{address}   (Ctrl-C ends it)")
    fact = ke.world_facts()[0] if model == WORLD else {"prompt": "", "subject": ""}
    serve(session, port, fact["prompt"].replace("{}", fact["subject"]), fact["subject"])
    return {"address": address, "kept": session.log()}
