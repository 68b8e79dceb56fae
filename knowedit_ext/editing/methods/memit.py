"""MEMIT: many facts at once, spread over several layers (Meng et al. 2023; memit/memit_main.py)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from ...checks import Count, Positive, Seed, StudyCompat, typed
from ...model.hooks import at_rest
from ...model.load import EditableModel
from ...moments import Moments
from ..closed_form import Contexts, GivenValues, Requests, closed_form, closed_form_values
from ..contexts import memit_contexts
from ..edit import Edit
from ..method import Method
from ..metric import Preserving
from ..params import EditParams

# Starting points for newer families, not published by the method's authors: EasyEdit and AlphaEdit, hparams/.
_STARTS = dict(layers=(4, 5, 6, 7, 8), v_num_grad_steps=25, mom2_update_weight=15000.0)
_EASYEDIT_VALUES = dict(v_weight_decay=1e-3, clamp_norm_factor=4.0)


@dataclass(frozen=True)
class MEMITParams(EditParams):
    """mom2_update_weight: lambda, how much the keys the model knows weigh against the new ones."""

    clamp_norm_factor: Positive = 0.75
    mom2_update_weight: Positive = 15000.0
    layer_selection: Literal["all"] = field(default="all", repr=False)

    algorithms = ("MEMIT",)
    other = frozenset({"context_template_length_params"})

    # memit, hparams/MEMIT/*.json; NeoX: MEMIT, appendix
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-xl": dict(layers=(13, 14, 15, 16, 17), mom2_update_weight=20000.0),
        "gpt-j": dict(layers=(3, 4, 5, 6, 7, 8), v_num_grad_steps=25, mom2_update_weight=15000.0),
        "gpt-neox": dict(layers=(6, 7, 8, 9, 10), clamp_norm_factor=0.3, mom2_update_weight=20000.0),
        "llama-2-7b": _STARTS | _EASYEDIT_VALUES,
        "llama-3-8b": _STARTS | dict(v_lr=0.1),  # AlphaEdit's
        "llama-3.2-3b": _STARTS | _EASYEDIT_VALUES,
        "mistral-7b": _STARTS | _EASYEDIT_VALUES,
        "qwen2-7b": _STARTS | _EASYEDIT_VALUES,
        "qwen2.5-7b": _STARTS | _EASYEDIT_VALUES,
        # Ours; a weight of 15,000 writes too little there, see docs/real-models.md.
        "smollm2-135m": dict(layers=(5, 6, 7, 8, 9), mom2_update_weight=1000.0),
        # The entries of its residual stream are too large for steps of 0.5.
        "gemma-3-270m": dict(layers=(3, 4, 5, 6, 7), v_lr=4.0, mom2_update_weight=150.0),
        # The built-in world: small steps end nearer to where they began, which spares the neighbourhood.
        "world": dict(layers=(1, 2, 3), clamp_norm_factor=2.0, v_lr=0.2, v_num_grad_steps=40, mom2_update_weight=400.0),
    }


@at_rest
@typed
def memit(
    model: EditableModel,
    requests: Requests,
    params: MEMITParams,
    moments: Moments | None = None,
    contexts: Contexts = None,
    values: GivenValues = None,
    compat: StudyCompat = None,
    *,
    earlier: Iterable[Edit] = (),
    ridge: float | str | None = None,
    seed: Seed = 0,
    batch: Count | None = None,
    progress: bool = False,
    store: str | Path | None = None,
) -> Edit:
    """Many facts, one change of the down projection of each of `params.layers`, bottom up.

    moments: second moments of the unedited model's keys at those layers.
    contexts: groups of templates with one `{}`; a key is the mean of the groups' means. The first is the bare "{}".
        None: generated from the model with `seed`.
    ridge: added to the moments' diagonal where they are not positive definite, see `Moments.solve`.
    earlier: edits that are in the model already, whose keys are to keep their values; see `history`.
    compat: "hase": values never stop early, and noise is drawn as in google/belief-localization (see docs/problems.md).
    values: [n, hidden] what the last edited layer is to put out (z), see `memit_values`; or published files of them,
        see `import_values`; None: optimised here, `batch` edits at once.
    store: folder where values are kept as they are computed, a file a request: a call that was killed goes on there,
        and under `torchrun` every rank computes its share (docs/folders.md).

    The model is left as it was. Raises ValueError for bad requests, layers or moments, before anything is computed, and
    where a layer does anything else to the down projection's output than to multiply it (Granite) or to divide it by
    its root mean square (Gemma2, Gemma3, OLMo2) before adding it to the residual stream, see `editing/residual.py`.
    """
    metric = Preserving(moments, params.mom2_update_weight, params.update_norm_lambda, ridge)  # Eqn. 14
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
        problems=True,
    )


@at_rest
@typed
def memit_values(
    model: EditableModel,
    requests: Requests,
    params: MEMITParams,
    *,
    contexts: Contexts = None,
    seed: Seed = 0,
    compat: StudyCompat = None,
    batch: Count | None = None,
    progress: bool = False,
    store: str | Path | None = None,
) -> torch.Tensor:
    """[n, hidden] float32: what `memit` makes the last edited layer put out for each request (z); its `values=`.

    They take most of an edit's time and need no moments: compute them once, in shares, and keep them with
    `export_values`. Arguments and errors are those of `memit`.
    """
    return closed_form_values(model, requests, params, contexts, seed, compat, batch, progress, store)


METHOD = Method(
    "memit",
    "MEMIT: many facts at once, over several layers",
    memit,
    MEMITParams,
    contexts=lambda model, params, seed: memit_contexts(model, seed),
    values=memit_values,
    many=True,
)
