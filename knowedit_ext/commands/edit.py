"""`knowedit edit`: compute an edit and save it, or show a saved one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

import knowedit_ext as ke

from ..checks import quoted
from ..world.store import WORLD
from .names import METHOD_NAMES, check_method
from .options import (
    ContextSeed,
    Device,
    Dtype,
    Limit,
    MomentsFolder,
    Params,
    ValueStore,
    data_to_read,
    file_to_read,
    file_to_write,
    load,
    meaningless,
    preset_or,
    template,
)
from .running import say
from .study_inputs import world_moments


def edit(
    model: Annotated[str | None, typer.Argument(help='Hub name or folder; "world": the built-in one.')] = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHOD_NAMES)}.")] = "memit",
    prompt: Annotated[str | None, template('One fact: a template with one {}, e.g. "{} plays the".')] = None,
    subject: Annotated[str | None, typer.Option(help="What goes into the {}.")] = None,
    target: Annotated[str | None, typer.Option(help="What is to follow.")] = None,
    requests: Annotated[Path | None, data_to_read("Many: a JSON list of requests or CounterFact records")] = None,
    moments: MomentsFolder = None,
    params: Params = "",
    out: Annotated[Path | None, file_to_write("Where the edit goes (.safetensors).")] = None,
    show: Annotated[Path | None, file_to_read("Print what a saved edit holds, and do nothing else.")] = None,
    limit: Limit = None,
    seed: ContextSeed = 0,
    store: ValueStore = None,
    device: Device = None,
    dtype: Dtype = None,
) -> dict[str, Any] | None:
    """Compute an edit and save it, or show a saved one; with --store under torchrun too."""
    fact = {"--prompt": prompt, "--subject": subject, "--target": target}
    given = {"MODEL": model, "--requests": requests, "--out": out, "--params": params or None}
    if show is not None:
        others = {"--moments": moments, "--limit": limit, "--store": store}
        meaningless(given | fact | others, "--show FILE does nothing else")
        return _tell(ke.Edit.load(show), show, shown=True)
    check_method(method)
    if any(fact.values()):
        meaningless({"--requests": requests, "--limit": limit}, "they are of many facts, --prompt is one")
        given = fact | {name: value for name, value in given.items() if name != "--requests"}
    missing = [name for name, value in given.items() if not value and (name != "--params" or model is None)]
    if not missing and not (params := preset_or(params, method, model)):
        missing = ["--params"]
    if missing:
        hint = "one fact: --prompt, --subject, --target; --show FILE shows a saved edit"
        if missing == ["--params"]:
            hint = f"no {method} preset is called {quoted(Path(model).name)}; `knowedit methods` lists them"
        raise ValueError(f"{', '.join(missing)} missing ({hint})")
    if store is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("several ranks share their values through a folder: give --store DIR")
    from ..datasets.records import read_records
    from ..editing.methods import METHODS, method_of
    from ..studies.treatment import Treatment

    chosen = method_of(method)
    if store is not None and not chosen.takes("store"):
        keep = ", ".join(name for name, each in METHODS.items() if each.takes("store"))
        raise ValueError(f"--store: {method} keeps no values; {keep} do")
    if prompt is not None:
        edit_requests = [ke.EditRequest(prompt, subject, target)]
    else:
        edit_requests = [ke.EditRequest.of(record) for record in read_records(requests)[:limit]]
    if not edit_requests:
        raise ValueError(f"'{requests}' holds no edit requests")
    if chosen.single and len(edit_requests) != 1:
        raise ValueError(
            f"{method} edits one fact at a time, '{requests}' has {len(edit_requests)}: use --limit 1 or memit"
        )
    line = Treatment(method, chosen, chosen.params_of(params), history=False)
    held = None if moments is None else ke.Moments.load(moments)
    if held is None and line.uses_moments and model != WORLD:
        raise ValueError(
            f"{method} needs second moments of the model: --moments, a folder that `knowedit moments` makes"
        )
    loaded = load(model, device, dtype)
    if held is None and model == WORLD:
        held = world_moments(loaded, [line])
    options = dict(seed=seed, progress=True, store=store, moments=held)
    taken = {option: value for option, value in options.items() if chosen.takes(option)}
    made = ke.edit(loaded, edit_requests, method, params=line.params, **taken)
    if int(os.environ.get("RANK", 0)):
        return None
    made.save(out)
    return _tell(made, out)


def _tell(edit: ke.Edit, file: Path, shown: bool = False) -> dict[str, Any]:
    say(edit.summary())
    if not shown:
        say(file)
    weights = {name: float(edit.delta(name).norm()) for name in edit.changes}
    return {"method": edit.method, "requests": edit.requests, "params": edit.params, "weights": weights, "file": file}
