"""ROME: rank-one edits, one fact at a time (Meng et al. 2022; rome/rome_main.py, compute_u.py, compute_v.py).

k* is a mean over contexts, in which the published code gives the bare prompt as much weight as each of them. Without a
BOS token the bare prompt's key is unlike theirs: what begins a text is what attention falls back on. It is then nearly
absent from C^-1 k*, along which the change goes, and either it gets a part of the change (one key on both sides), or
all else more than the whole (the bare prompt's key in the denominator). So here the bare prompt and the mean of the
others get exactly the same: u is the least in the metric of C with u^T k = 1 for both keys, and k* is their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from ...checks import Count, Seed, StudyCompat, typed
from ...model.hooks import at_rest
from ...model.load import EditableModel
from ...moments import Moments
from ..anchor import anchored
from ..contexts import rome_contexts
from ..deflation import ALIKE
from ..edit import Edit
from ..history import earlier_keys
from ..keys import KeyRows, OverContexts, bare_pass
from ..method import Method
from ..metric import Plain, Preserving, prepare, solve_in_keys, unmoved
from ..params import EditParams
from ..ready import check_ready
from ..request import EditRequest, check_each, check_requests, warn_of_known
from ..stacked import stacked
from ..stored_values import stored_values
from ..tokenized import TokenizedRequest, check_drawn_once, context_weights, tokenize_requests
from ..values import Values, check_values, optimise_values

OneKey = Literal["mean", "bare"]
ROUNDING = 1e-4  # of a key's length: what differs by less is one key (GPT-J's layer 0 reads the token alone)

# Starting points for newer families, not published by the method's authors: EasyEdit, hparams/.
_STARTS = dict(layers=(5,), v_num_grad_steps=25, v_weight_decay=1e-3)


@dataclass(frozen=True)
class ROMEParams(EditParams):
    """context_template_length_params: [length, how many] of the generated contexts, beside the bare prompt."""

    context_template_length_params: tuple[tuple[Count, Count], ...] = ((5, 10), (10, 10))

    algorithms = ("ROME",)
    other = frozenset({"layer_selection", "mom2_update_weight"})
    in_values = (*EditParams.in_values, "context_template_length_params")

    # rome, hparams/ROME/*.json
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-medium": dict(layers=(8,), clamp_norm_factor=3.0),
        "gpt2-large": dict(layers=(12,)),
        "gpt2-xl": dict(layers=(17,)),
        "gpt-j": dict(layers=(5,)),
        "gpt-neox": dict(layers=(15,)),
        "llama-2-7b": _STARTS,
        "llama-3-8b": _STARTS,
        "mistral-7b": _STARTS,
        "qwen2.5-7b": _STARTS,
        "smollm2-135m": dict(layers=(5,)),
        "gemma-3-270m": dict(layers=(5,)),
        # The built-in world: its early site ends at layer 3, where the MLP adds little to the stream (|v| is small).
        # Subjects often begin a text there, where keys differ most: as published, with few contexts the bare prompt
        # weighs more.
        "world": dict(
            layers=(3,), clamp_norm_factor=16.0, v_weight_decay=0.05, context_template_length_params=((5, 2), (10, 2))
        ),
    }


@typed
def rome(
    model: EditableModel,
    request: EditRequest | Mapping[str, Any] | Iterable[EditRequest | Mapping[str, Any]],
    params: ROMEParams,
    moments: Moments | None = None,
    contexts: Sequence[str] | None = None,
    compat: StudyCompat = None,
    *,
    values: torch.Tensor | None = None,
    earlier: Iterable[Edit] = (),
    ridge: float | str | None = None,
    seed: Seed = 0,
) -> Edit:
    """One fact, one rank-one change of the down projection of each of `params.layers`.

    moments: second moments of the keys at those layers; may be None when `params.mom2_adjustment` is off.
    contexts: templates with one `{}`, the bare "{}" first; None: generated from the model with `seed`.
    compat: "reference": in k* the bare prompt weighs as much as each other context, and u ~ C^-1 k*, as published;
        None: the bare prompt and the mean of the other contexts get the same change. "hase": as "reference", and its
        values never stop early, one that is to be minimised gets one update more, and noise is drawn as in
        google/belief-localization (see docs/problems.md).
    values: [1, hidden] what the MLP of the layer is to put out (v*), see `rome_values`; None: optimised here.
    earlier: edits that are in the model already: for their keys (`Edit.keys`) the change is exactly nothing.
    ridge: added to the moments' diagonal where they are not positive definite, see `Moments.solve`.

    The model is left as it was. Raises ValueError for bad requests, layers or moments, before anything is computed, and
    for a key that an earlier edit has too: it cannot both stay and change.
    """
    requests = check_requests(request, problems=True)
    if len(requests) > 1:
        raise ValueError(
            f"ROME edits one fact at a time, not {len(requests)}: rome_each makes an edit of each, or use MEMIT"
        )
    options = dict(contexts=contexts, compat=compat, values=values, earlier=earlier, ridge=ridge, seed=seed)
    return rome_each(model, requests, params, moments, **options)[0]


@at_rest
@typed
def rome_each(
    model: EditableModel,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    params: ROMEParams,
    moments: Moments | None = None,
    *,
    contexts: Sequence[str] | None = None,
    compat: StudyCompat = None,
    values: torch.Tensor | None = None,
    earlier: Iterable[Edit] = (),
    ridge: float | str | None = None,
    seed: Seed = 0,
    batch: Count | None = None,
    progress: bool = False,
    one_key: OneKey | None = None,
) -> list[Edit]:
    """An edit for each request, each as `rome` makes it on the model as it is; their values are optimised together.

    Requests may contradict each other. batch: values optimised at once; None: from free memory. Where `params.layers`
    are several, the upper ones depend on the edit below and the edits are made one after the other. values: [n, hidden]
    of all, see `rome`. one_key: on both sides, the plain mean over contexts or the bare prompt's (see `r_rome`).
    """
    requests = check_each(requests)
    check_ready(model, params, moments, needed=params.mom2_adjustment)
    history = earlier_keys(model, earlier, params.layers)
    generated = seed if contexts is None else None
    contexts, tokenized = _in_contexts(model, requests, params, contexts, seed, compat)
    if values is not None:
        _check_alone(params, tokenized)
        check_values(model, values, requests)
    warn_of_known(model, requests, [request.facts[0] for request in tokenized])

    adjusted = params.mom2_adjustment
    metric = Preserving(moments, 1.0, params.update_norm_lambda, ridge) if adjusted else Plain()
    prepare(model, metric, params.layers)

    published = compat is not None or one_key is not None

    def directions(layer: int, keys: torch.Tensor, bare: torch.Tensor) -> torch.Tensor:
        """[d_in, n] of length 1 for keys [n, d_in]: u ~ C^-1 k* (ROME, Eqn. 2), of all keys in one solve; with earlier
        keys what is left of it when they are to stay. By default u^T bare is u^T k*; bare [n, d_in]."""
        before = history[layer]
        if before:
            each = [solve_in_keys(metric, layer, key[:, None], before, epsilon=0.0) for key in keys]
            u = torch.cat(each, 1)
        else:
            u = metric.alone(layer, keys.T) if adjusted else keys.T
        if not published:
            u = unmoved(metric, layer, keys.T, u, _apart(bare, keys).T, before)
        return u / u.norm(dim=0)

    weights = context_weights([contexts] if published else [part for part in (contexts[:1], contexts[1:]) if part])
    edits = []
    for group in [tokenized] if len(params.layers) == 1 else [[request] for request in tokenized]:
        made = [
            Edit({}, "rome", [r.request.to_dict()], params.to_dict(), contexts, compat, seed=generated) for r in group
        ]
        with ExitStack() as stack:
            puts = [stack.enter_context(stacked(model, edit, params.layers)) for edit in made]
            for layer in params.layers:
                keys, factors = _one_layer(
                    model, group, weights, params, directions, layer, compat, batch, progress, one_key, values
                )
                for edit, put, key, (u, v) in zip(made, puts, keys, factors, strict=True):
                    edit.keys[layer] = key[:, None].float().cpu()
                    put(layer, u, v)
        edits += made
    return edits


def _one_layer(
    model: EditableModel,
    requests: Sequence[TokenizedRequest],
    weights: Sequence[float],
    params: ROMEParams,
    directions: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    layer: int,
    compat: str | None,
    batch: int | None,
    progress: bool,
    one_key: OneKey | None,
    given: torch.Tensor | None,
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Keys [requests, d_in]; u [d_in, 1] and v [d_out, 1] of each request. given: their values, if they are there."""
    redrawn = any(request.stream for request in requests)
    if redrawn or given is not None:  # as released, keys have noise of their own
        rows: OverContexts = KeyRows(model, requests, weights)
        inputs, outputs = rows.pass_through(rows.start, 0, layer, layer, "mlp")
    if given is None:
        optimised = _optimised(model, requests, params, layer, compat, batch, progress, keys=not redrawn)
        targets = anchored(model, requests, params, optimised, "mlp", layer, compat)
        if not redrawn:
            rows = OverContexts(requests, weights)
            inputs, outputs = optimised.keys, optimised.outputs
    else:
        targets = given
    bare = [rows.bare(x) for x in (inputs, outputs)]
    mean = [rows.mean(x) for x in (inputs, outputs)]
    keys = (bare if one_key == "bare" else mean)[0]  # k*, [requests, d_in]
    lines = directions(layer, keys, bare[0]).T
    if redrawn:  # the bare prompt is noised anew
        bare = bare_pass(model, requests, layer, "mlp")
    keys_now, values_now = mean if one_key == "mean" else bare
    factors = []
    for n, u in enumerate(lines):
        gets = keys_now[n].to(u.device) @ u
        if abs(gets) < ALIKE * abs(keys[n].to(u.device) @ u):
            raise ValueError(
                f"layer {layer}: of a change for '{requests[n].request.subject}' its bare prompt would get nothing: an "
                "earlier edit has its key. Leave out the earlier edit that is redone"
            )
        v = (targets[n].to(u.device, torch.float64) - values_now[n].to(u.device)) / gets
        factors.append((u[:, None].clone(), v[:, None]))
    return keys, factors


def _apart(bare: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What tells the bare prompts' keys [requests, d_in] from k*; zero where that is rounding."""
    apart = bare - keys
    return torch.where(apart.norm(dim=1, keepdim=True) > ROUNDING * keys.norm(dim=1, keepdim=True), apart, 0.0)


@at_rest
@typed
def rome_values(
    model: EditableModel,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    params: ROMEParams,
    *,
    contexts: Sequence[str] | None = None,
    seed: Seed = 0,
    compat: StudyCompat = None,
    batch: Count | None = None,
    progress: bool = False,
    store: str | Path | None = None,
) -> torch.Tensor:
    """[n, hidden] float32: what `rome` makes the MLP put out for each request (v*); its `values=`.

    They take most of an edit's time, need no moments and do not depend on how k* is made. store: as in `memit`. Other
    arguments and errors are those of `rome_each`; ValueError too for several layers, whose values depend on each other.
    """
    requests = check_each(requests)
    check_ready(model, params, None, needed=False)
    contexts, tokenized = _in_contexts(model, requests, params, contexts, seed, compat)
    _check_alone(params, tokenized)
    (layer,) = params.layers

    def values(numbers: range, batch: int | None, progress: bool) -> torch.Tensor:
        part = tokenized[numbers.start : numbers.stop]
        optimised = _optimised(model, part, params, layer, compat, batch, progress, keys=False)
        return anchored(model, part, params, optimised, "mlp", layer, compat)

    if store is None:
        return values(range(len(requests)), batch, progress).detach().float().cpu()
    told = compat == "hase" or params.norm_anchor is not None
    how = {"method": METHOD.name, "contexts": contexts, "compat": compat if told else None}
    compute = lambda numbers: values(numbers, len(numbers), False)  # noqa: E731
    return stored_values(store, how, model, tokenized, params, layer, batch, compute, progress)


def _optimised(
    model: EditableModel,
    requests: Sequence[TokenizedRequest],
    params: ROMEParams,
    layer: int,
    compat: str | None,
    batch: int | None,
    progress: bool,
    keys: bool,
) -> Values:
    options = dict(compat=compat, more_to_minimise=1 if compat == "hase" else 0, keys=keys)
    return optimise_values(model, requests, params, "mlp", layer, batch, progress, **options)


def _in_contexts(
    model: EditableModel,
    requests: Sequence[EditRequest],
    params: ROMEParams,
    contexts: Sequence[str] | None,
    seed: int,
    compat: str | None,
) -> tuple[list[str], list[TokenizedRequest]]:
    contexts = rome_contexts(model, params.context_template_length_params, seed) if contexts is None else list(contexts)
    if not contexts or contexts[0] != "{}":
        raise ValueError("contexts must begin with the bare prompt, '{}'")
    return contexts, tokenize_requests(model, requests, contexts, params.fact_token, compat)


def _check_alone(params: ROMEParams, requests: Sequence[TokenizedRequest]) -> None:
    """ValueError where values cannot be told without the rest of the edit."""
    if len(params.layers) > 1:
        raise ValueError(f"values of layers {list(params.layers)} depend on each other: they are given for one layer")
    check_drawn_once(requests)


METHOD = Method(
    "rome",
    "ROME: one fact, one rank-one change",
    rome,
    ROMEParams,
    each=rome_each,
    contexts=lambda model, params, seed: rome_contexts(model, params.context_template_length_params, seed),
    values=rome_values,
    single=True,
)
