"""EMMET: many facts at once, whose keys come out exactly as wanted (Gupta et al. 2024; unified-model-editing).

For one request S = N k (k^T N k)^-1 with N = (w C + mu I)^-1: the value is met exactly. For more the released code adds
emmet_lambda I to K^T N K, and that is MEMIT with mom2_update_weight = emmet_lambda w (and mu emmet_lambda): so it is
computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ...checks import Compat, Count, Positive, Seed, typed
from ...model.hooks import at_rest
from ...model.load import EditableModel
from ...moments import Moments
from ..closed_form import Contexts, GivenValues, Requests, closed_form
from ..contexts import memit_contexts
from ..edit import Edit
from ..history import earlier_edits
from ..method import Method
from ..metric import Preserving, solve_in_keys
from ..request import check_requests
from .memit import MEMITParams, memit_values

_LLAMA = dict(v_num_grad_steps=25, clamp_norm_factor=4.0, v_weight_decay=1e-3)


@dataclass(frozen=True)
class EMMETParams(MEMITParams):
    """mom2_update_weight: w. emmet_lambda: how far, with several requests, values may be missed."""

    mom2_update_weight: Positive = 1.0
    emmet_lambda: Positive = 0.1

    algorithms = ("EMMET",)
    other = frozenset({"context_template_length_params", "calculate_objective_value"})

    # unified-model-editing, hparams/EMMET/*.json; llama-3-8b: encore, hparams/EMMET; EasyEdit, hparams/EMMET/*.yaml
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-xl": dict(layers=(17,), mom2_update_weight=1000.0),
        "gpt-j": dict(layers=(5,), v_num_grad_steps=25),
        "llama-2-7b": dict(layers=(5,), **_LLAMA),
        "llama-3-8b": dict(layers=(5,), v_num_grad_steps=25, mom2_update_weight=100000.0),
        "llama-3.2-3b": dict(layers=(5,), mom2_update_weight=100000.0, **_LLAMA),
        "gpt2-xl/easyedit": dict(layers=(13, 14, 15, 16, 17)),
        "gpt-j/easyedit": dict(layers=(3, 4, 5, 6, 7, 8), v_num_grad_steps=25),
        "llama-2-7b/easyedit": dict(layers=(4, 5, 6, 7, 8), **_LLAMA),
        "world": MEMITParams.presets["world"] | dict(mom2_update_weight=4000.0),
    }


@at_rest
@typed
def emmet(
    model: EditableModel,
    requests: Requests,
    params: EMMETParams,
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
    """One fact exactly, or many at once, see above; published with one layer. Arguments and errors are `memit`'s."""
    requests, before = check_requests(requests), earlier_edits(model, earlier)
    alone = len(requests) == 1 and not before
    share = 1.0 if alone else params.emmet_lambda
    metric = Preserving(moments, share * params.mom2_update_weight, share * params.update_norm_lambda, ridge)
    return closed_form(
        METHOD.name,
        model,
        requests,
        params,
        metric,
        contexts=contexts,
        values=values,
        compat=compat,
        earlier=before,
        seed=seed,
        batch=batch,
        progress=progress,
        store=store,
        solve=partial(solve_in_keys, metric, epsilon=0.0) if alone else None,
    )


METHOD = Method(
    "emmet",
    "EMMET: facts whose keys come out as wanted",
    emmet,
    EMMETParams,
    contexts=lambda model, params, seed: memit_contexts(model, seed),
    values=memit_values,
    many=True,
)
