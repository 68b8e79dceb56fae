"""ROME: rank-one edits, one fact at a time (Meng et al. 2022; rome/rome_main.py, compute_u.py, compute_v.py).

k* is a mean over contexts, in which the published code gives the bare prompt as much weight as each of them. Without a
BOS token the bare prompt's key is unlike theirs: what begins a text is what attention falls back on. It is then nearly
absent from C^-1 k*, along which the change goes, and either it gets a part of the change (one key on both sides), or
all else more than the whole (the bare prompt's key in the denominator). So here the bare prompt is one half of k*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ...checks import Count, Seed, StudyCompat, typed
from ...model.hooks import at_rest
from ...model.load import EditableModel
from ...moments import Moments
from ..anchor import anchored
from ..contexts import rome_contexts
from ..edit import Edit
from ..history import earlier_keys
from ..keys import KeyRows, OverContexts, bare_pass
from ..method import Method
from ..metric import Plain, Preserving, prepare, solve_in_keys
from ..params import EditParams
from ..ready import check_ready
from ..request import EditRequest, check_requests, warn_of_known
from ..stacked import stacked
from ..tokenized import TokenizedRequest, context_weights, tokenize_requests
from ..values import optimise_values

OneKey = Literal["mean", "bare"]

# Starting points for newer families, not published by the method's authors: EasyEdit, hparams/.
_STARTS = dict(layers=(5,), v_num_grad_steps=25, v_weight_decay=1e-3)


@dataclass(frozen=True)
class ROMEParams(EditParams):
    """context_template_length_params: [length, how many] of the generated contexts, beside the bare prompt."""

    context_template_length_params: tuple[tuple[Count, Count], ...] = ((5, 10), (10, 10))

    algorithms = ("ROME",)
    other = frozenset({"layer_selection", "mom2_update_weight"})

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
        # Subjects often begin a text there, where keys differ most: with few contexts the bare prompt weighs more.
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
    earlier: Iterable[Edit] = (),
    ridge: float | str | None = None,
    seed: Seed = 0,
) -> Edit:
    """One fact, one rank-one change of the down projection of each of `params.layers`.

    moments: second moments of the keys at those layers; may be None when `params.mom2_adjustment` is off.
    contexts: templates with one `{}`, the bare "{}" first; None: generated from the model with `seed`.
    compat: "reference": in k* the bare prompt weighs as much as each other context, as published, and not as much as
        all of them together; "hase": that too, and its values never stop early, one that is to be minimised gets one
        update more, and noise is drawn as in google/belief-localization (see docs/problems.md).
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
    options = dict(contexts=contexts, compat=compat, earlier=earlier, ridge=ridge, seed=seed)
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
    earlier: Iterable[Edit] = (),
    ridge: float | str | None = None,
    seed: Seed = 0,
    batch: Count | None = None,
    progress: bool = False,
    one_key: OneKey | None = None,
) -> list[Edit]:
    """An edit for each request, each as `rome` makes it on the model as it is; their values are optimised together.

    Requests may contradict each other. batch: values optimised at once; None: from free memory. Where `params.layers`
    are several, the upper ones depend on the edit below and the edits are made one after the other. one_key: on both
    sides, the plain mean over contexts or the bare prompt's (see `r_rome`).
    """
    requests = [one for request in requests for one in check_requests(request, problems=True)]
    if not requests:
        raise ValueError("no edit requests")
    check_ready(model, params, moments, needed=params.mom2_adjustment)
    history = earlier_keys(model, earlier, params.layers)
    generated = seed if contexts is None else None
    contexts = rome_contexts(model, params.context_template_length_params, seed) if contexts is None else list(contexts)
    if not contexts or contexts[0] != "{}":
        raise ValueError("contexts must begin with the bare prompt, '{}'")
    tokenized = tokenize_requests(model, requests, contexts, params.fact_token, compat)
    warn_of_known(model, requests, [request.facts[0] for request in tokenized])

    adjusted = params.mom2_adjustment
    metric = Preserving(moments, 1.0, params.update_norm_lambda, ridge) if adjusted else Plain()
    prepare(model, metric, params.layers)

    def directions(layer: int, keys: torch.Tensor) -> torch.Tensor:
        """[d_in, n] for keys [n, d_in]: u is C^-1 k* up to scale (ROME, Eqn. 2), of all keys in one solve; with earlier
        keys what is left of it when they are to stay."""
        if history[layer]:
            each = [solve_in_keys(metric, layer, key[:, None], history[layer], epsilon=0.0) for key in keys]
            u = torch.cat(each, 1)
        else:
            u = metric.alone(layer, keys.T) if adjusted else keys.T
        return u / u.norm(dim=0)

    published = compat is not None or one_key is not None
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
                    model, group, weights, params, directions, layer, compat, batch, progress, one_key
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
    directions: Callable[[int, torch.Tensor], torch.Tensor],
    layer: int,
    compat: str | None,
    batch: int | None,
    progress: bool,
    one_key: OneKey | None,
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Keys [requests, d_in]; u [d_in, 1] and v [d_out, 1] of each request."""
    redrawn = any(request.stream for request in requests)
    if redrawn:  # as released, keys have noise of their own
        rows: OverContexts = KeyRows(model, requests, weights)
        inputs, outputs = rows.pass_through(rows.start, 0, layer, layer, "mlp")
    more = 1 if compat == "hase" else 0
    options = dict(compat=compat, more_to_minimise=more, keys=not redrawn)
    optimised = optimise_values(model, requests, params, "mlp", layer, batch, progress, **options)
    if not redrawn:
        rows = OverContexts(requests, weights)
        inputs, outputs = optimised.keys, optimised.outputs
    bare = [rows.bare(x) for x in (inputs, outputs)]
    mean = [rows.mean(x) for x in (inputs, outputs)]
    keys = (bare if one_key == "bare" else mean)[0]  # k*, [requests, d_in]
    targets = anchored(model, requests, params, optimised, "mlp", layer, compat)
    if redrawn:  # the bare prompt is noised anew
        bare = bare_pass(model, requests, layer, "mlp")
    keys_now, values_now = mean if one_key == "mean" else bare
    factors = []
    for n, u in enumerate(directions(layer, keys).T):
        v = (targets[n].to(u.device, torch.float64) - values_now[n].to(u.device)) / (keys_now[n].to(u.device) @ u)
        factors.append((u[:, None].clone(), v[:, None]))
    return keys, factors


METHOD = Method(
    "rome",
    "ROME: one fact, one rank-one change",
    rome,
    ROMEParams,
    each=rome_each,
    contexts=lambda model, params, seed: rome_contexts(model, params.context_template_length_params, seed),
    single=True,
)
