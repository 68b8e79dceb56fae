"""The editing methods, a file each: parameters with presets, the function, and a `METHOD` for the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from ...checks import quoted, typed
from ...model.load import EditableModel
from ..edit import Edit
from ..method import Method
from ..params import LayerParams
from ..request import EditRequest

METHODS: dict[str, Method] = {
    method.name: method
    for method in (import_module(f"{__name__}.{file.name}").METHOD for file in iter_modules(__path__))
}


def method_of(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"unknown method {quoted(name)}: expected one of {', '.join(METHODS)}")
    return METHODS[name]


@typed
def edit(
    model: EditableModel,
    requests: EditRequest | Mapping[str, Any] | Iterable[EditRequest | Mapping[str, Any]],
    method: str,
    *,
    params: LayerParams | Mapping[str, Any] | str | Path,
    **options: Any,
) -> Edit:
    """Edit facts by any method of `METHODS`: `ke.edit(model, requests, "memit", params="gpt2-xl", moments=m)`.

    requests: one, or several that are edited together (rome and r-rome take one).
    params: a preset's name, a JSON or YAML file with the published keys, those keys, or the method's own class.
    options: what the method's function takes: moments, contexts, compat, seed, progress, ... (see `ke.rome`,
        `ke.memit`, `ke.finetune`).

    The model is left as it was. Raises ValueError for an unknown method or preset and for what the method refuses,
    TypeError for options that it does not take.
    """
    chosen = method_of(method)
    chosen.check_options(options)
    return chosen.edit(model, requests, chosen.params_of(params), **options)
