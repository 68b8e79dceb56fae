"""Edits by a trained editor: one pass forward, one back through the edited layers, and no optimisation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..checks import Compat, Positive, typed
from ..editing.changes import LowRank
from ..editing.edit import Edit, bind_all
from ..editing.request import EditRequest, check_requests
from ..model.gradients import check_gradients
from ..model.hooks import at_rest, learning
from ..model.load import EditableModel
from ..model.weights import parameters
from ..sweep.engine import default_max_rows
from ..sweep.packed import parts_of
from .editor import Factors, LearnedEditor
from .efk import EFK
from .mend import MEND
from .texts import gradient_rows, text_of_request


@at_rest
@typed
def mend(
    model: EditableModel,
    requests: EditRequest | Mapping[str, Any] | Iterable[EditRequest | Mapping[str, Any]],
    editor: MEND,
    scale: Positive = 1.0,
    compat: Compat = None,
) -> Edit:
    """One edit of all requests together by MEND: of their mean loss over all target tokens.

    compat="reference": as the first edit of a process of rome's baselines/mend: the trained statistics are thrown away
        for those of the edit's own rows, and rates are dealt out in the order of the model's parameters.

    The model is left as it was. Raises ValueError for bad requests, another model's editor and one without statistics.
    """
    asked = check_requests(requests)
    editor.check_model(model)
    if compat is None:
        editor.check_statistics()
    else:
        editor = _as_released(model, editor)
    check_gradients(model, editor.layers[0], model.num_layers)
    with learning(model):
        (rows,) = gradient_rows(model, [[text_of_request(model, r.fact()) for r in asked]], editor.weights)
    return _edit(editor, editor.factors(rows, ()), asked, scale, compat).bind(model)


@at_rest
@typed
def mend_each(
    model: EditableModel,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    editor: MEND,
    scale: Positive = 1.0,
) -> list[Edit]:
    """An edit of each request by itself, as `mend` would make it, all in one packed pass."""
    asked = [EditRequest.of(request) for request in requests]
    for request in asked:
        check_requests(request)
    editor.check_model(model)
    editor.check_statistics()
    check_gradients(model, editor.layers[0], model.num_layers)
    texts = [text_of_request(model, request.fact()) for request in asked]
    edits = []
    for part in parts_of([len(text.ids) for text in texts], default_max_rows(model)):
        with learning(model):
            rows = gradient_rows(model, [[text] for text in texts[part]], editor.weights)
        factors_each = editor.factors_each(editor.read(rows))
        for request, factors in zip(asked[part], factors_each, strict=True):
            edits.append(_edit(editor, factors, [request], scale, None))
    bind_all(edits, model)
    return edits


@at_rest
@typed
def efk(
    model: EditableModel,
    request: EditRequest | Mapping[str, Any] | Iterable[EditRequest | Mapping[str, Any]],
    editor: EFK,
    scale: Positive = 1.0,
    compat: Compat = None,
) -> Edit:
    """One edit of one request by KE (EFK); compat="reference" is the same: the released executor only ignores `scale`.

    The model is left as it was. Raises ValueError for a bad request and another model's editor.
    """
    asked = check_requests(request)
    if len(asked) != 1:
        raise ValueError(f"efk edits one fact at a time, got {len(asked)} requests")
    editor.check_model(model)
    check_gradients(model, editor.layers[0], model.num_layers)
    text = text_of_request(model, asked[0].fact())
    with learning(model):
        (rows,) = gradient_rows(model, [[text]], editor.weights)
    scale = 1.0 if compat == "reference" else scale
    return _edit(editor, editor.factors(rows, text.ids), asked, scale, compat).bind(model)


def _as_released(model: EditableModel, editor: MEND) -> MEND:
    """A copy with statistics to be made anew, and rates in the order of the model's parameters."""
    released = copy.copy(editor)
    released.network = copy.deepcopy(editor.network).train()
    for transform in released.network.mend.values():
        transform.k.fill_(float("nan"))
    own = [weight.name for weight in editor.weights]
    order = [each.name for each in parameters(model.hf) if each.name in own]
    rates = editor.network.edit_lrs.detach()
    released.network.edit_lrs.data = torch.stack([rates[order.index(name)] for name in own])
    return released


def _edit(
    editor: LearnedEditor,
    factors: Factors,
    requests: Sequence[EditRequest],
    scale: float,
    compat: str | None,
) -> Edit:
    edit = Edit({}, editor.name, [r.to_dict() for r in requests], {"layers": editor.layers, "scale": scale}, [], compat)
    for weight in editor.weights:
        inputs, outputs = factors[weight.name]
        if not len(inputs):
            raise ValueError(f"no token's gradient reaches '{weight.name}': there is nothing to transform")
        edit.changes[weight.name] = LowRank(
            (scale * inputs.detach()).T.contiguous().cpu(), outputs.detach().T.contiguous().cpu(), weight.input_first
        )
    return edit
