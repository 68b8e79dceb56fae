"""What MEMIT and its kin do alike: values of the last edited layer, spread over the layers by a metric's solve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
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
from .request import EditRequest, check_each, check_requests, warn_of_known
from .residual import measure_adding
from .spread import Aim, Solve, spread
from .stored_values import stored_values
from .tokenized import TokenizedRequest, check_drawn_once, context_weights, tokenize_requests
from .values import Rule, check_values, optimise_values

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
    store: str | Path | None = None,
) -> Edit:
    """The edit of method `name`: see `memit` for the arguments, whose metric and aim are handed over here.

    solve: another one than the metric's. problems: whether it takes requests that minimise, or under noise.
    """
    requests = check_requests(requests, problems)
    check_ready(model, params, metric.moments, needed=True)
    adding = measure_adding(model, params.layers) if aim.site == "layer" else None
    history = earlier_keys(model, earlier, params.layers)
    prepare(model, metric, params.layers)
    generated = seed if contexts is None else None
    contexts = context_groups(model, contexts, seed)
    tokenized = _tokenized(model, requests, params, contexts, compat)
    if values is None:
        values = _optimised(model, tokenized, params, contexts, batch, progress, aim, compat, store)
    elif store is not None:
        raise ValueError("values are given, so none are computed and kept: give values= or store=, not both")
    else:
        values = _given(model, values, requests, params, aim)
    edit = Edit({}, name, [r.to_dict() for r in requests], params.to_dict(), contexts, compat, seed=generated)
    weights = context_weights(contexts)
    spread(model, edit, params.layers, tokenized, weights, values, history, solve or metric.solve, aim, adding)
    return edit


def closed_form_values(
    model: EditableModel,
    requests: Requests,
    params: EditParams,
    contexts: Contexts,
    seed: int,
    compat: str | None,
    batch: int | None,
    progress: bool,
    store: str | Path | None,
    aim: Aim = Aim(),  # noqa: B008  (frozen)
) -> torch.Tensor:
    """[n, hidden] float32: what `closed_form` would make the last edited layer put out for each request (z)."""
    requests = check_each([requests] if isinstance(requests, (EditRequest, Mapping)) else requests)
    check_ready(model, params, None, needed=False)
    if aim.site == "layer":
        measure_adding(model, params.layers)
    contexts = context_groups(model, contexts, seed)
    tokenized = _tokenized(model, requests, params, contexts, compat)
    check_drawn_once(tokenized)
    return _optimised(model, tokenized, params, contexts, batch, progress, aim, compat, store)


def _tokenized(
    model: EditableModel,
    requests: Sequence[EditRequest],
    params: EditParams,
    groups: Sequence[Sequence[str]],
    compat: str | None,
) -> list[TokenizedRequest]:
    return tokenize_requests(model, requests, [text for group in groups for text in group], params.fact_token, compat)


def _optimised(
    model: EditableModel,
    requests: Sequence[TokenizedRequest],
    params: EditParams,
    contexts: Sequence[Sequence[str]],
    batch: int | None,
    progress: bool,
    aim: Aim,
    compat: str | None,
    store: str | Path | None,
) -> torch.Tensor:
    warn_of_known(model, [request.request for request in requests], [request.facts[0] for request in requests])
    layer, loss_layer = params.layers[-1], params.v_loss_layer

    def values(numbers: range, batch: int | None, progress: bool) -> torch.Tensor:
        part = requests[numbers.start : numbers.stop]
        how = dict(beside=aim.beside, loss_layer=loss_layer, nll_factor=aim.nll_factor, rule=_of(aim.rule, numbers))
        optimised = optimise_values(model, part, params, aim.site, layer, batch, progress, compat=compat, **how)
        return anchored(model, part, params, optimised, aim.site, layer, compat)

    if store is None:
        return values(range(len(requests)), batch, progress)
    check_drawn_once(requests)
    told = compat == "hase" or aim.rule is not None or params.norm_anchor is not None  # does compat tell values apart?
    how = {"method": aim.name, "contexts": contexts, "compat": compat if told else None}
    compute = lambda numbers: values(numbers, len(numbers), False)  # noqa: E731
    return stored_values(store, how, model, requests, params, layer, batch, compute, progress)


def _of(rule: Rule | None, numbers: range) -> Rule | None:
    """The rule where these requests are optimised without those before them, by whose numbers it may tell edits."""
    if rule is None or not numbers.start:
        return rule
    return lambda seen: rule(replace(seen, edits=[numbers.start + edit for edit in seen.edits]))


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
    check_values(model, values, requests)
    return values


def context_groups(model: EditableModel, contexts: Sequence[Sequence[str]] | None, seed: int) -> list[list[str]]:
    groups = memit_contexts(model, seed) if contexts is None else [list(group) for group in contexts]
    if not groups or not groups[0] or groups[0][0] != "{}" or not all(groups):
        raise ValueError("contexts must be groups of templates that begin with the bare prompt, [['{}'], [...]]")
    return groups
