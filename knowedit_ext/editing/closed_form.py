"""What MEMIT and its kin do alike: values of the last edited layer, spread over the layers by a metric's solve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..model.load import EditableModel
from .anchor import anchored
from .contexts import memit_contexts
from .edit import Edit
from .history import earlier_keys
from .metric import Metric, prepare
from .params import EditParams
from .published import import_values
from .ready import check_ready
from .request import EditRequest, check_requests, warn_of_known
from .residual import check_adds_to_residual
from .spread import Aim, Solve, spread
from .tokenized import TokenizedRequest, context_weights, tokenize_requests
from .values import optimise_values

Requests = Iterable[EditRequest | Mapping[str, Any]]
Contexts = Sequence[Sequence[str]] | None
GivenValues = torch.Tensor | str | Path | Sequence[str | Path] | None


def closed_form(
    name: str,
    model: EditableModel,
    requests: Requests,
    params: EditParams,
    metric: Metric,
    *,
    contexts: Contexts,
    values: GivenValues,
    compat: str | None,
    earlier: Iterable[Edit],
    seed: int,
    batch: int | None,
    progress: bool,
    aim: Aim = Aim(),  # noqa: B008  (frozen)
    solve: Solve | None = None,
    problems: bool = False,
) -> Edit:
    """The edit of method `name`: see `memit` for the arguments, whose metric and aim are handed over here.

    solve: another one than the metric's. problems: whether it takes requests that minimise, or under noise.
    """
    requests = check_requests(requests, problems)
    check_ready(model, params, metric.moments, needed=True)
    if aim.site == "layer":
        check_adds_to_residual(model, params.layers)
    history = earlier_keys(model, earlier, params.layers)
    prepare(model, metric, params.layers)
    generated = seed if contexts is None else None
    contexts = context_groups(model, contexts, seed)
    tokenized = _tokenized(model, requests, params, contexts, compat)
    if values is None:
        values = _optimised(model, tokenized, params, batch, progress, aim, compat)
    else:
        values = _given(model, values, requests, params, aim)
    edit = Edit({}, name, [r.to_dict() for r in requests], params.to_dict(), contexts, compat, seed=generated)
    spread(
        model, edit, params.layers, tokenized, context_weights(contexts), values, history, solve or metric.solve, aim
    )
    return edit


def closed_form_values(
    model: EditableModel,
    requests: Requests,
    params: EditParams,
    contexts: Contexts,
    seed: int,
    batch: int | None,
    progress: bool,
) -> torch.Tensor:
    """[n, hidden] float32: what `closed_form` would make the last edited layer put out for each request (z)."""
    requests = check_requests(requests, problems=True)
    check_ready(model, params, None, needed=False)
    check_adds_to_residual(model, params.layers)
    tokenized = _tokenized(model, requests, params, context_groups(model, contexts, seed))
    return _optimised(model, tokenized, params, batch, progress, Aim(), compat=None)


def _tokenized(
    model: EditableModel,
    requests: Sequence[EditRequest],
    params: EditParams,
    groups: Sequence[Sequence[str]],
    compat: str | None = None,
) -> list[TokenizedRequest]:
    return tokenize_requests(model, requests, [text for group in groups for text in group], params.fact_token, compat)


def _optimised(
    model: EditableModel,
    requests: Sequence[TokenizedRequest],
    params: EditParams,
    batch: int | None,
    progress: bool,
    aim: Aim,
    compat: str | None,
) -> torch.Tensor:
    warn_of_known(model, [request.request for request in requests], [request.facts[0] for request in requests])
    how = dict(beside=aim.beside, loss_layer=params.v_loss_layer, nll_factor=aim.nll_factor, rule=aim.rule)
    how["compat"] = compat
    layer = params.layers[-1]
    optimised = optimise_values(model, requests, params, aim.site, layer, batch, progress, **how)
    return anchored(model, requests, params, optimised, aim.site, layer, compat)


def _given(
    model: EditableModel, values: Any, requests: Sequence[EditRequest], params: EditParams, aim: Aim
) -> torch.Tensor:
    """Values that somebody computed before, or ValueError."""
    if not isinstance(values, torch.Tensor):
        if aim.site != "layer":
            raise ValueError(
                "files of values hold MEMIT's, of a layer's output: give a tensor of what the MLP puts out"
            )
        return import_values(values, requests, params, model)
    if tuple(values.shape) != (len(requests), model.hidden_size):
        raise ValueError(f"values are {list(values.shape)}: expected [{len(requests)} requests, {model.hidden_size}]")
    if not torch.isfinite(values).all():
        raise ValueError("values hold NaN or infinite numbers")
    return values


def context_groups(model: EditableModel, contexts: Sequence[Sequence[str]] | None, seed: int) -> list[list[str]]:
    groups = memit_contexts(model, seed) if contexts is None else [list(group) for group in contexts]
    if not groups or not groups[0] or groups[0][0] != "{}" or not all(groups):
        raise ValueError("contexts must be groups of templates that begin with the bare prompt, [['{}'], [...]]")
    return groups
