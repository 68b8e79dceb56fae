"""ENCORE: MEMIT for long sequences of edits (Gupta et al. 2025; scalable-model-editing/encore).

mu keeps the weights from growing, the keys of earlier edits keep their values (`earlier=`), and a value is done as soon
as the model would say the target, long before it is sure of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch

from ...checks import Below, Compat, Count, NotNegative, Seed, typed
from ...model.hooks import at_rest
from ...model.load import EditableModel
from ...moments import Moments
from ..closed_form import Contexts, GivenValues, Requests, closed_form, closed_form_values
from ..contexts import memit_contexts
from ..edit import Edit
from ..method import Method
from ..metric import Preserving
from ..spread import Aim
from ..values import Rule, Seen
from .memit import MEMITParams


@dataclass(frozen=True)
class ENCOREParams(MEMITParams):
    """update_norm_lambda: mu. add_prev_edits: whether the keys of `earlier` edits count.

    prob_cutoff: when a value is done. -k: at the k-th step at which every token of the target is the most probable one
    in every context; p > 0: when the target's mean probability is above p; 0: as in MEMIT.
    """

    update_norm_lambda: NotNegative = 10.0
    prob_cutoff: Annotated[float, Below(1)] = -4.0
    add_prev_edits: bool = True

    algorithms = ("ENCORE",)
    other = frozenset({"context_template_length_params", "calculate_objective_value", "emmet_lambda"})
    other |= {"dynamic_multiplier", "random_vector_preservation"}
    fixed = {"norm_control": 0.0}
    in_values = (*MEMITParams.in_values, "prob_cutoff")

    # encore, hparams/ENCORE/*.json
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-xl": dict(layers=(13, 14, 15, 16, 17), mom2_update_weight=20000.0),
        "llama-2-7b": dict(layers=(4, 5, 6, 7, 8), v_num_grad_steps=25, prob_cutoff=-3.0),
        "llama-3-8b": dict(layers=(4, 5, 6, 7, 8), v_num_grad_steps=25, prob_cutoff=-2.0, update_norm_lambda=20.0),
        "world": MEMITParams.presets["world"] | dict(update_norm_lambda=1.0, prob_cutoff=-10.0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prob_cutoff < 0 and self.prob_cutoff % 1:
            raise ValueError(f"prob_cutoff is {self.prob_cutoff}: expected a whole number of steps where it is below 0")


def stop_rule(cutoff: float, compat: str | None) -> Rule | None:
    """See `ENCOREParams`. compat "reference": as released, not whether all tokens are right counts, but whether five
    are, those of the bare prompt left out: so it works with 1 + 5 contexts and targets of one token."""
    if not cutoff:
        return None
    steps: Counter[int] = Counter()

    def rule(seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
        ones = torch.ones(len(seen.edits))
        if cutoff > 0:
            return seen.probability() > cutoff, ones
        if compat == "reference":
            right = torch.zeros(len(ones)).index_add(0, seen.owner, (seen.right & (seen.context > 0)).float()) == 5
        else:
            right = seen.certain()
        steps.update(edit for edit, here in zip(seen.edits, right.tolist(), strict=True) if here)
        return right & torch.tensor([steps[edit] >= -cutoff for edit in seen.edits]), ones

    return rule


@at_rest
@typed
def encore(
    model: EditableModel,
    requests: Requests,
    params: ENCOREParams,
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

    earlier: all edits that the model holds already, so that they keep what they wrote. compat: see `stop_rule`.
    Other arguments and errors are those of `memit`.
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
        earlier=earlier if params.add_prev_edits else (),
        seed=seed,
        batch=batch,
        progress=progress,
        store=store,
        aim=_aim(params, compat),
    )


@at_rest
@typed
def encore_values(
    model: EditableModel,
    requests: Requests,
    params: ENCOREParams,
    *,
    contexts: Contexts = None,
    seed: Seed = 0,
    compat: Compat = None,
    batch: Count | None = None,
    progress: bool = False,
    store: str | Path | None = None,
) -> torch.Tensor:
    """[n, hidden] float32: what `encore` makes the last edited layer put out for each request; its `values=`."""
    aim = _aim(params, compat)
    return closed_form_values(model, requests, params, contexts, seed, compat, batch, progress, store, aim)


def _aim(params: ENCOREParams, compat: str | None) -> Aim:
    return Aim("encore", rule=stop_rule(params.prob_cutoff, compat))


METHOD = Method(
    "encore",
    "ENCORE: MEMIT for long sequences of edits",
    encore,
    ENCOREParams,
    contexts=lambda model, params, seed: memit_contexts(model, seed),
    values=encore_values,
    many=True,
)
