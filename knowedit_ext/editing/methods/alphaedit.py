"""AlphaEdit: MEMIT whose changes stay in the null space of the known keys (Fang et al. 2025; AlphaEdit_main.py).

The published unsymmetric d x d system (P (K K^T + H) + L2 I) B = P K R^T says B = P B, and is in keys
B = P A (L2 I + A^T P A)^-1 R^T: one small Cholesky, equal to 2e-14.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...checks import Compat, Count, Positive, Seed, Share, typed
from ...model.hooks import at_rest
from ...model.load import EditableModel
from ...moments import Moments
from ..closed_form import Contexts, GivenValues, Requests, closed_form
from ..contexts import memit_contexts
from ..edit import Edit
from ..method import Method
from ..metric import NullSpace
from .memit import MEMITParams, memit_values

_LLAMA = dict(layers=(4, 5, 6, 7, 8), v_num_grad_steps=25, v_lr=0.1)


@dataclass(frozen=True)
class AlphaEditParams(MEMITParams):
    """As `MEMITParams`, whose mom2_update_weight it has no use for; mu is a part of L2.

    nullspace_threshold: eigenvalues of the second moment below it are the null space; its scale is that of the model's
    keys, and the published 2e-2, taken where neither is given, leaves nothing of some models. nullspace_share: instead
    of it, the share of the eigenvalues' sum that the null space may hold. L2: weight of the size of the change.
    """

    nullspace_threshold: Positive | None = None
    nullspace_share: Share | None = None
    L2: Positive = 10.0

    algorithms = ("AlphaEdit",)
    other = frozenset({"context_template_length_params", "P_loc"})

    # AlphaEdit, hparams/AlphaEdit/*.json; llama-3.1-8b, qwen2.5-7b: EasyEdit, hparams/AlphaEdit/*.yaml
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-xl": dict(layers=(13, 14, 15, 16, 17), L2=10.0),
        "gpt-j": dict(layers=(3, 4, 5, 6, 7, 8), v_num_grad_steps=25),
        "llama-3-8b": _LLAMA,
        "llama-3.1-8b": _LLAMA,
        "qwen2.5-7b": _LLAMA | dict(v_lr=0.5, v_weight_decay=1e-3, clamp_norm_factor=4.0, L2=1.0),
        "world": {k: v for k, v in MEMITParams.presets["world"].items() if k != "mom2_update_weight"}
        | dict(nullspace_share=0.05, L2=1.0),
    }

    def __post_init__(self) -> None:
        if self.nullspace_threshold is None and self.nullspace_share is None:
            object.__setattr__(self, "nullspace_threshold", 2e-2)
        super().__post_init__()
        if self.update_norm_lambda:
            raise ValueError(
                f"update_norm_lambda is {self.update_norm_lambda}: in the null space L2 is that, add it there"
            )
        if self.nullspace_threshold is not None and self.nullspace_share is not None:
            raise ValueError("nullspace_threshold and nullspace_share are two ways to tell the null space: give one")


@at_rest
@typed
def alphaedit(
    model: EditableModel,
    requests: Requests,
    params: AlphaEditParams,
    moments: Moments | None = None,
    *,
    contexts: Contexts = None,
    values: GivenValues = None,
    compat: Compat = None,
    earlier: Iterable[Edit] = (),
    seed: Seed = 0,
    batch: Count | None = None,
    progress: bool = False,
    store: str | Path | None = None,
) -> Edit:
    """Many facts, changes within the null space of the moments at `params.layers`, bottom up.

    Arguments and errors are those of `memit`; ValueError too where the null space is empty or everything.
    """
    metric = NullSpace(moments, params.L2, params.nullspace_threshold, params.nullspace_share)
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
    )


METHOD = Method(
    "alphaedit",
    "AlphaEdit: MEMIT within the null space of what is known",
    alphaedit,
    AlphaEditParams,
    contexts=lambda model, params, seed: memit_contexts(model, seed),
    values=memit_values,
    many=True,
)
