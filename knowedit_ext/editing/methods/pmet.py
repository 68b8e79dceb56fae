"""PMET: MEMIT whose values are of the MLP alone (Li et al. 2024; xpq-tech/PMET).

At the last edited layer a delta of the attention's output and one of the MLP's are optimised together; the attention's
is given up, so that the MLP need not learn what is the attention's to do. The residual is of what the down projection
puts out, and is divided by the root of the number of layers left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...checks import Compat, Count, NotNegative, Positive, Seed, typed
from ...model.hooks import at_rest
from ...model.load import EditableModel
from ...moments import Moments
from ..closed_form import Contexts, GivenValues, Requests, closed_form, closed_form_values
from ..contexts import memit_contexts
from ..edit import Edit
from ..method import Method
from ..metric import Preserving
from ..spread import Aim
from ..values import Seen
from .memit import MEMITParams

LIGHTER = 0.1  # what the target's loss weighs once it is the most probable
KL_SMALL = 0.01


@dataclass(frozen=True)
class PMETParams(MEMITParams):
    """nll_loss_factor: of the target's loss, a tenth of it behind a step at which the target was the most probable."""

    v_num_grad_steps: Count = 30
    v_lr: Positive = 0.2
    kl_factor: NotNegative = 1.0
    mom2_update_weight: Positive = 6000.0
    nll_loss_factor: Positive = 1.0

    algorithms = ("PMET",)
    other = frozenset({"rewrite_module_tmps"})
    in_values = (*MEMITParams.in_values, "nll_loss_factor")

    # PMET, hparams/PMET/*.json; EasyEdit, hparams/PMET/*.yaml
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt-j": dict(layers=(3, 4, 5, 6, 7, 8)),
        "gpt-j/easyedit": dict(layers=(3, 4, 5, 6, 7, 8), mom2_update_weight=15000.0),
        "gpt-neox": dict(
            layers=(6, 7, 8, 9, 10), clamp_norm_factor=0.8, v_lr=0.5, kl_factor=0.8, mom2_update_weight=15000.0
        ),
    }
    _llama = dict(layers=(4, 5, 6, 7, 8), clamp_norm_factor=1.0, v_lr=0.5, kl_factor=0.0625, mom2_update_weight=15000.0)
    presets |= {
        "llama-2-7b": _llama | dict(v_num_grad_steps=20),
        "llama-3.2-3b": _llama | dict(v_num_grad_steps=25),
        # The MLP adds little to the stream at the built-in world's layers.
        "world": MEMITParams.presets["world"] | dict(clamp_norm_factor=16.0, kl_factor=0.0625),
    }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PMETParams:
        edited = values.get("rewrite_module_tmps", []) if isinstance(values, Mapping) else []
        if len(edited) > 1 or any("attn" in str(name) or "attention" in str(name) for name in edited):
            raise ValueError(f"rewrite_module_tmps is {edited}: only the MLP's down projection is edited")
        return super().from_dict(values)


def stop_rule(seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
    """compute_zs.py:176-183: the target is the most probable throughout, and the KL term is small."""
    certain = seen.certain()
    return certain & (seen.kl <= KL_SMALL), torch.where(certain, LIGHTER, 1.0)


def aim_of(params: PMETParams) -> Aim:
    return Aim("pmet", "mlp", ("attn",), params.nll_loss_factor, stop_rule, math.sqrt)


@at_rest
@typed
def pmet(
    model: EditableModel,
    requests: Requests,
    params: PMETParams,
    moments: Moments | None = None,
    *,
    contexts: Contexts = None,
    values: GivenValues = None,
    compat: Compat = None,
    earlier: Iterable[Edit] = (),
    ridge: float | str | None = None,
    seed: Seed = 0,
    batch: Count | None = None,
    progress: bool = False,
    store: str | Path | None = None,
) -> Edit:
    """Many facts, one change of the down projection of each of `params.layers`, bottom up.

    values: [n, hidden] what the down projection of the last layer is to put out. Other arguments and errors are those
    of `memit`; layers that normalise or scale what the down projection puts out can be edited too.
    """
    metric = Preserving(moments, params.mom2_update_weight, params.update_norm_lambda, ridge)
    return closed_form(
        METHOD.name,
        model,
        requests,
        params,
        metric,
        contexts=contexts,
        values=values,
        compat=compat,
        earlier=earlier,
        seed=seed,
        batch=batch,
        progress=progress,
        store=store,
        aim=aim_of(params),
    )


@at_rest
@typed
def pmet_values(
    model: EditableModel,
    requests: Requests,
    params: PMETParams,
    *,
    contexts: Contexts = None,
    seed: Seed = 0,
    compat: Compat = None,
    batch: Count | None = None,
    progress: bool = False,
    store: str | Path | None = None,
) -> torch.Tensor:
    """[n, hidden] float32: what `pmet` makes the last down projection put out for each request; its `values=`."""
    return closed_form_values(model, requests, params, contexts, seed, compat, batch, progress, store, aim_of(params))


METHOD = Method(
    "pmet",
    "PMET: MEMIT whose values are of the MLP alone",
    pmet,
    PMETParams,
    contexts=lambda model, params, seed: memit_contexts(model, seed),
    values=pmet_values,
    many=True,
)
