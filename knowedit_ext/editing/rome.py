"""ROME: rank-one edits, one fact at a time (Meng et al. 2022; rome/rome_main.py, compute_u.py, compute_v.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..model import EditableModel
from ..moments import Moments
from .contexts import rome_contexts
from .edit import Edit
from .keys import KeyRows
from .memit import check_model
from .params import ROMEParams
from .request import EditRequest, check_compat, check_requests, warn_of_known
from .stacked import stacked
from .values import optimise_values


def rome(
    model: EditableModel,
    request: EditRequest | Mapping[str, Any],
    params: ROMEParams,
    moments: Moments | None = None,
    contexts: Sequence[str] | None = None,
    compat: str | None = None,
    *,
    ridge: float | str | None = None,
    seed: int = 0,
) -> Edit:
    """One fact, one rank-one change of the down projection of each of `params.layers`.

    moments: second moments of the keys at those layers; may be None when `params.mom2_adjustment` is off.
    contexts: templates with one `{}`, the bare "{}" first; None: generated from the model with `seed`.
    compat: "reference": the key is averaged over contexts but the value is solved for the bare prompt's key, as
        published; None: one key for both (R-ROME).
    ridge: added to the moments' diagonal where they are not positive definite, see `Moments.solve`.

    The model is left as it was. Raises ValueError for bad requests, layers or moments, before anything is computed.
    """
    check_compat(compat)
    found = check_requests(request)
    if len(found) > 1:
        raise ValueError(f"ROME edits one fact at a time, not {len(found)}: call it for each, or use MEMIT")
    [request] = found
    check_model(model, params, moments, needed=params.mom2_adjustment)
    generated = seed if contexts is None else None
    contexts = rome_contexts(model, params.context_template_length_params, seed) if contexts is None else list(contexts)
    if not contexts or contexts[0] != "{}":
        raise ValueError("contexts must begin with the bare prompt, '{}'")
    warn_of_known(model, [request])
    edit = Edit({}, "rome", [request.to_dict()], params.to_dict(), contexts, compat, seed=generated)
    with stacked(model, edit, params.layers) as put:
        for layer in params.layers:
            put(layer, *_one_layer(model, request, params, moments, contexts, compat, ridge, layer))
    return edit


def _one_layer(
    model: EditableModel,
    request: EditRequest,
    params: ROMEParams,
    moments: Moments | None,
    contexts: Sequence[str],
    compat: str | None,
    ridge: float | str | None,
    layer: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """u [d_in, 1] and v [d_out, 1]."""
    rows = KeyRows(model, [request], [contexts], params.fact_token)
    _, inputs, outputs = rows.pass_through(rows.packed.start, 0, layer + 1, layer)
    key = rows.mean(inputs).T  # k*, [d_in, 1]
    # u is C^-1 k* up to scale (ROME, Eqn. 2), and so is (C + k* k*^T)^-1 k*, by Sherman and Morrison.
    u = moments.solve(layer, key, 1.0, ridge).matrix if params.mom2_adjustment else key
    u = u[:, 0] / u.norm()
    target = optimise_values(model, [request], contexts, params, "mlp", layer).values[0].double().to(u.device)
    if compat == "reference":
        key_now, value_now = inputs[0].double(), outputs[0].double()  # of the bare prompt
    else:
        key_now, value_now = key[:, 0], rows.mean(outputs)[0]
    v = (target - value_now) / (key_now @ u)
    return u[:, None], v[:, None]
