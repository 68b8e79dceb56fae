"""The norm anchor (NAS, Liu et al. 2026): what the MLP is to put out is brought to the length that values had at first.

In a long sequence of edits values and weights make each other grow. With v* = v0 + delta, v0 what the MLP puts out now,
the value is rescaled to |v*| = `norm_anchor`, the mean over facts on the unedited model (`value_norm`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..checks import typed
from ..model.hooks import at_rest
from ..model.load import EditableModel
from .keys import bare_pass
from .params import EditParams
from .request import EditRequest, check_requests
from .tokenized import TokenizedRequest, tokenize_requests
from .values import Values, optimise_values

DROPPED = 0.05  # of the norms, the largest
TOO_LONG = {"layer": 2.0, "mlp": 5.0}  # times the anchor: as released such a value is left as it is


def anchored(
    model: EditableModel,
    requests: Sequence[TokenizedRequest],
    params: EditParams,
    optimised: Values,
    site: str,
    layer: int,
    compat: str | None,
) -> torch.Tensor:
    """Values [requests, hidden] at `site`, rescaled where `params.norm_anchor` says so.

    compat "reference": as released (SasyaTitech/NAS), a v* of more than twice that norm (ROME: five times) is given up.
    """
    if params.norm_anchor is None:
        return optimised.values
    wanted = _of_the_mlp(model, requests, optimised, layer)  # v*
    norm = wanted.norm(dim=1, keepdim=True)
    values = optimised.values + wanted * (params.norm_anchor / norm - 1)
    if compat is None:
        return values
    return torch.where(norm > TOO_LONG[site] * params.norm_anchor, optimised.initial, values)


@at_rest
@typed
def value_norm(
    model: EditableModel,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    params: EditParams,
    site: str = "layer",
    *,
    contexts: Sequence[str] = ("{}",),
) -> float:
    """Mean |v*| over facts, the largest 5 % left out: `norm_anchor` for the edits that follow. The model: unedited.

    requests: many facts (1,000 of CounterFact as published), not those to be edited. site: "layer" for MEMIT and its
    kin, "mlp" for ROME. contexts: the bare prompt alone, as published.
    """
    if model.applied_edits:
        raise ValueError(
            f"the anchor is the unedited model's: {len(model.applied_edits)} edits are applied to this one"
        )
    tokenized = tokenize_requests(model, check_requests(requests), list(contexts), params.fact_token)
    layer = params.layers[-1]
    optimised = optimise_values(model, tokenized, params, site, layer)
    norms = _of_the_mlp(model, tokenized, optimised, layer).norm(dim=1).double().sort().values
    return float(norms[: len(norms) - int(DROPPED * len(norms))].mean())


def _of_the_mlp(
    model: EditableModel, requests: Sequence[TokenizedRequest], optimised: Values, layer: int
) -> torch.Tensor:
    """v* [requests, hidden]: what the MLP of the layer would put out."""
    _, now = bare_pass(model, requests, layer, "mlp")
    return now.to(optimised.values) + optimised.values - optimised.initial
