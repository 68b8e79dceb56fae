"""MEMIT: many facts at once, spread over several layers (Meng et al. 2023; memit/memit_main.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from ...checks import Positive
from ...model.hooks import at_rest
from ...model.load import EditableModel
from ...moments import Moments
from ..contexts import memit_contexts
from ..edit import Edit
from ..method import Method
from ..params import EditParams
from ..published import import_values
from ..ready import check_ready
from ..request import EditRequest, check_compat, check_requests, warn_of_known
from ..spread import spread
from ..tokenized import TokenizedRequest, context_weights, tokenize_requests
from ..values import optimise_values

# Starting points for newer families, not published by the method's authors: EasyEdit and AlphaEdit, hparams/.
_STARTS = dict(layers=(4, 5, 6, 7, 8), v_num_grad_steps=25, mom2_update_weight=15000.0)
_EASYEDIT_VALUES = dict(v_weight_decay=1e-3, clamp_norm_factor=4.0)


@dataclass(frozen=True)
class MEMITParams(EditParams):
    """mom2_update_weight: lambda, how much the keys the model knows weigh against the new ones."""

    clamp_norm_factor: Positive = 0.75
    mom2_update_weight: Positive = 15000.0
    layer_selection: Literal["all"] = field(default="all", repr=False)

    algorithms = ("MEMIT", "AlphaEdit")
    other = frozenset({"context_template_length_params", "nullspace_threshold", "L2", "P_loc"})

    # memit, hparams/MEMIT/*.json; NeoX: MEMIT, appendix
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-xl": dict(layers=(13, 14, 15, 16, 17), mom2_update_weight=20000.0),
        "gpt-j": dict(layers=(3, 4, 5, 6, 7, 8), v_num_grad_steps=25, mom2_update_weight=15000.0),
        "gpt-neox": dict(layers=(6, 7, 8, 9, 10), clamp_norm_factor=0.3, mom2_update_weight=20000.0),
        "llama-2-7b": _STARTS | _EASYEDIT_VALUES,
        "llama-3-8b": _STARTS | dict(v_lr=0.1),  # AlphaEdit's
        "mistral-7b": _STARTS | _EASYEDIT_VALUES,
        "qwen2.5-7b": _STARTS | _EASYEDIT_VALUES,
        # The built-in world: small steps end nearer to where they began, which spares the neighbourhood.
        "world": dict(layers=(1, 2, 3), clamp_norm_factor=2.0, v_lr=0.2, v_num_grad_steps=40, mom2_update_weight=400.0),
    }


@at_rest
def memit(
    model: EditableModel,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    params: MEMITParams,
    moments: Moments | None = None,
    *,
    contexts: Sequence[Sequence[str]] | None = None,
    values: torch.Tensor | str | Path | Sequence[str | Path] | None = None,
    compat: str | None = None,
    preserve: Sequence[Edit] = (),
    ridge: float | str | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: bool = False,
) -> Edit:
    """Many facts, one change of the down projection of each of `params.layers`, bottom up.

    moments: second moments of the unedited model's keys at those layers.
    contexts: groups of templates with one `{}`; a key is the mean of the groups' means. The first is the bare "{}".
        None: generated from the model with `seed`.
    preserve: earlier edits, applied to this model, whose keys are to keep their values: their K K^T joins the moments.
    ridge: added to the moments' diagonal where they are not positive definite, see `Moments.solve`.
    values: [n, hidden] what the last edited layer is to put out (z), see `memit_values`; or published files of them,
        see `import_values`; None: optimised here, `batch` edits at once.

    The model is left as it was. Raises ValueError for bad requests, layers or moments, before anything is computed, and
    for post-norm families (Gemma2, Gemma3, OLMo2): there the down projection's output is normalised before it is added
    to the residual stream, so a residual of the layer's output is not what the projection has to put out.
    """
    check_compat(compat)
    found = check_requests(requests)
    _refuse_post_norm(model)
    check_ready(model, params, moments, needed=True)
    generated = seed if contexts is None else None
    contexts = _groups(model, contexts, seed)
    flat = [context for group in contexts for context in group]
    tokenized = tokenize_requests(model, found, flat, params.fact_token)
    earlier = [EditRequest.of(request) for edit in preserve for request in edit.requests]
    kept = tokenize_requests(model, earlier, flat, params.fact_token)
    if values is None:
        values = _optimised(model, tokenized, params, batch, progress)
    else:
        values = _given(model, values, found, params)

    def solve(layer: int, keys: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
        # (lambda C + K K^T)^-1 K, Eqn. 14
        together = torch.cat([earlier, keys], 1)
        return moments.solve(layer, together, params.mom2_update_weight, ridge).matrix[:, earlier.shape[1] :]

    described = [request.to_dict() for request in found]
    edit = Edit({}, "memit", described, params.to_dict(), contexts, compat, seed=generated)
    spread(model, edit, params.layers, tokenized, kept, context_weights(contexts), values, solve)
    return edit


@at_rest
def memit_values(
    model: EditableModel,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    params: MEMITParams,
    *,
    contexts: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """[n, hidden] float32: what `memit` makes the last edited layer put out for each request (z); its `values=`.

    They take most of an edit's time and need no moments: compute them once, in shares, and keep them with
    `export_values`. Arguments and errors are those of `memit`.
    """
    found = check_requests(requests)
    _refuse_post_norm(model)
    check_ready(model, params, None, needed=False)
    flat = [context for group in _groups(model, contexts, seed) for context in group]
    return _optimised(model, tokenize_requests(model, found, flat, params.fact_token), params, batch, progress)


def _optimised(
    model: EditableModel, requests: Sequence[TokenizedRequest], params: MEMITParams, batch: int | None, progress: bool
) -> torch.Tensor:
    warn_of_known(model, [request.facts[0] for request in requests])
    return optimise_values(model, requests, params, "layer", params.layers[-1], batch, progress).values


def _given(model: EditableModel, values: Any, requests: Sequence[EditRequest], params: MEMITParams) -> torch.Tensor:
    """Values that somebody computed before, or ValueError."""
    if not isinstance(values, torch.Tensor):
        return import_values(values, requests, params, model)
    if tuple(values.shape) != (len(requests), model.hidden_size):
        raise ValueError(f"values are {list(values.shape)}: expected [{len(requests)} requests, {model.hidden_size}]")
    if not torch.isfinite(values).all():
        raise ValueError("values hold NaN or infinite numbers")
    return values


def _refuse_post_norm(model: EditableModel) -> None:
    if model.modules.family.post_norm:
        raise ValueError(
            f"MEMIT is not defined for '{model.modules.model_type}': it normalises the MLP's output before adding it, "
            "so the residual that MEMIT spreads is not the down projection's; ROME works"
        )


def _groups(model: EditableModel, contexts: Sequence[Sequence[str]] | None, seed: int) -> list[list[str]]:
    groups = memit_contexts(model, seed) if contexts is None else [list(group) for group in contexts]
    if not groups or not groups[0] or groups[0][0] != "{}" or not all(groups):
        raise ValueError("contexts must be groups of templates that begin with the bare prompt, [['{}'], [...]]")
    return groups


METHOD = Method(
    "memit",
    "MEMIT: many facts at once, over several layers",
    memit,
    MEMITParams,
    contexts=lambda model, params, seed: memit_contexts(model, seed),
    many=True,
)
