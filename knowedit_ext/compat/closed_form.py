"""MEMIT and its kin, which differ in their parameters, in what solves for a layer's change, and in what is given back.

One line of the table below is a method. Values that EasyEdit asks for one by one are computed together, see `ahead`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import knowedit_ext as ke
from knowedit_ext.editing.closed_form import closed_form_values
from knowedit_ext.editing.edit import Edit
from knowedit_ext.editing.methods.pmet import aim_of
from knowedit_ext.editing.spread import Aim, spread
from knowedit_ext.editing.tokenized import context_weights, tokenize_requests
from knowedit_ext.model.hooks import resting

from . import ahead, translate
from .caches import cached_values
from .swap import NotServed, Upstream
from .translate import check_agreement, check_fact_token, check_modules, opened, params_of, request_of, weights_at

if TYPE_CHECKING:
    from .editing import Editors


@dataclass(frozen=True)
class Call:
    """What is asked of a method: the model as ours, requests, parameters, contexts, and whose function is replaced."""

    model: ke.EditableModel
    requests: Sequence[ke.EditRequest]
    params: ke.MEMITParams
    contexts: Sequence[Sequence[str]]
    upstream: Upstream | None
    moments: Callable[[], ke.Moments]


@dataclass(frozen=True)
class Kin:
    """name: as hparams and libraries call it. params: from hparams. solved: a call and its values [n, hidden] -> the
    edit. given: (model, edit, a weight's name) -> what the library's function gives for it. aim: params -> what values
    are. check: (hparams, tokenizer, is there a cache of values?), raises NotServed. put_back: is an edit that stands by
    itself, so that those to come can be computed with it?"""

    name: str
    params: Callable[[Any], ke.MEMITParams]
    solved: Callable[[Call, torch.Tensor], Edit]
    given: Callable[[nn.Module, Edit, str], Any]
    aim: Callable[[Any], Aim] = lambda params: Aim()
    check: Callable[[Any, Any, bool], None] = lambda hparams, tok, cached: None
    put_back: bool = True


def closed_form(
    editors: Editors,
    kin: Kin,
    model: nn.Module,
    tok: Any,
    raws: Sequence[Mapping[str, Any]],
    hparams: Any,
    upstream: Upstream | None,
    cache_template: str | None,
) -> Edit:
    layers = list(hparams.layers)
    if layers != sorted(set(layers)):
        raise NotServed(f"layers {layers} are not in ascending order")
    kin.check(hparams, tok, cache_template is not None)
    params = kin.params(hparams)
    with opened(model, tok) as editable:
        check_modules(editable, hparams, layers)
        check_fact_token(hparams)
        asked = lambda some: [request_of(editors.library, raw, kin.name, model) for raw in some]  # noqa: E731
        requests = asked(raws)
        check_agreement(requests)
        contexts = editors.contexts(model, tok, kin.name, upstream)
        moments = lambda: editors.moments(editable, hparams, layers, upstream)  # noqa: E731
        call = Call(editable, requests, params, contexts, upstream, moments)

        def optimised(some: Sequence[Mapping[str, Any]]) -> torch.Tensor:
            aim = kin.aim(params)
            return closed_form_values(editable, asked(some), params, contexts, 0, None, None, False, None, aim)

        with resting(editable):
            if cache_template is not None:
                values = cached_values(raws, optimised, cache_template, layers[-1], hparams.clamp_norm_factor)
            elif len(raws) == 1 and kin.put_back:
                values = ahead.taken(raws[0], (kin.name, params), weights_at(editable, layers), optimised)[None]
            else:
                values = optimised(raws)
            edit = kin.solved(call, values)
    translate.as_left_by_upstream(model)
    return edit


# -- MEMIT and EMMET ---------------------------------------------------------------------------------------------------


def _memit(call: Call, values: torch.Tensor) -> Edit:
    options = dict(contexts=call.contexts, values=values, compat="reference")
    return ke.memit(call.model, call.requests, call.params, call.moments(), **options)


def _factors(model: nn.Module, edit: Edit, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys [d_in, n], residuals [d_out, n]), float64 on the CPU."""
    change = edit.changes[name]
    return change.inputs.double().cpu(), change.outputs.double().cpu()


def _emmet_params(hparams: Any) -> ke.MEMITParams:
    """EasyEdit adds emmet_lambda for a lone request too: what it then solves is MEMIT's system, see `emmet`."""
    params = params_of(ke.EMMETParams, hparams, "EMMET")
    weight, mu = (params.emmet_lambda * x for x in (params.mom2_update_weight, params.update_norm_lambda))
    shared = {name: value for name, value in params.to_dict().items() if name != "emmet_lambda"}
    return ke.MEMITParams.from_dict(shared | {"mom2_update_weight": weight, "update_norm_lambda": mu})


# -- AlphaEdit ---------------------------------------------------------------------------------------------------------


def _alphaedit(call: Call, values: torch.Tensor) -> Edit:
    """By what its module keeps: `P`, projections, and `cache_c`, sums of K K^T over earlier keys, [layers, d, d] each;
    these get the new keys', as there."""
    home, layers, l2 = getattr(call.upstream, "module", None), list(call.params.layers), call.params.L2
    if not (hasattr(home, "P") and hasattr(home, "cache_c")):
        raise ValueError("AlphaEdit's projections are made by EasyEdit's apply_AlphaEdit_to_model: call that")
    place = {layer: number for number, layer in enumerate(layers)}

    def solve(layer: int, keys: torch.Tensor, earlier: Sequence[torch.Tensor]) -> torch.Tensor:
        """(P (K K^T + C) + L2 I)^-1 P K by way of n x n."""
        project, before = (x[place[layer]].to(keys) for x in (home.P, home.cache_c))
        cheap = project @ keys
        if bool(before.any()):
            system = project @ before
            system.diagonal().add_(l2)
            cheap = torch.linalg.solve(system, cheap)
        else:
            cheap = cheap / l2
        small = keys.T @ cheap
        small.diagonal().add_(1.0)
        return torch.linalg.solve(small, cheap, left=False)

    texts = [text for group in call.contexts for text in group]
    tokenized = tokenize_requests(call.model, call.requests, texts, call.params.fact_token)
    edit = Edit({}, "alphaedit", [r.to_dict() for r in call.requests], call.params.to_dict(), call.contexts, None)
    nothing = {layer: () for layer in layers}
    weights = context_weights(call.contexts)
    spread(call.model, edit, layers, tokenized, weights, values, nothing, solve, Aim())
    for layer, number in place.items():
        keys = edit.keys[layer].to(home.cache_c)
        home.cache_c[number] += keys @ keys.T
    return edit


def _dense(model: nn.Module, edit: Edit, name: str) -> torch.Tensor:
    return edit.delta(name).float().cpu()


# -- PMET --------------------------------------------------------------------------------------------------------------


def _pmet_params(hparams: Any) -> ke.PMETParams:
    if len(hparams.rewrite_module_tmps) > 1 or hparams.rewrite_module_tmps[0] != hparams.rewrite_module_tmp:
        raise NotServed(f"{hparams.rewrite_module_tmps} are edited there, here the MLP's down projection alone")
    return params_of(ke.PMETParams, hparams, "PMET")


def _check_pmet(hparams: Any, tok: Any, cached: bool) -> None:
    if tok.padding_side != "right":
        raise NotServed("with padding on the left it counts tokens from the padding, and edits at others")
    if cached:
        raise NotServed("a cache of PMET's values")


def _pmet(call: Call, values: torch.Tensor) -> Edit:
    return ke.pmet(call.model, call.requests, call.params, call.moments(), contexts=call.contexts, values=values)


def _dense_there(model: nn.Module, edit: Edit, name: str) -> torch.Tensor:
    return edit.delta(name).to(translate.weight_of(model, name).device, torch.float64)


MEMIT = Kin("MEMIT", lambda hparams: params_of(ke.MEMITParams, hparams, "MEMIT"), _memit, _factors)
EMMET = Kin("EMMET", _emmet_params, _memit, _factors, put_back=False)  # emmet_main.py:62-63: no copies are handed on
ALPHAEDIT = Kin("AlphaEdit", lambda hparams: params_of(ke.AlphaEditParams, hparams, "AlphaEdit"), _alphaedit, _dense)
PMET = Kin("PMET", _pmet_params, _pmet, _dense_there, aim_of, _check_pmet)
