"""Is everything there that an edit needs? Said before anything is computed."""

from __future__ import annotations

import torch

from ..model.load import EditableModel
from ..model.weights import find_weight
from ..moments import Moments
from .edit import originals
from .params import EditParams


def check_ready(model: EditableModel, params: EditParams, moments: Moments | None, needed: bool) -> None:
    """Raise ValueError for layers that are not there or offloaded, numbers that are not finite, wrong or no moments.

    needed: whether the method uses moments.
    """
    layers = list(params.layers) if params.v_loss_layer is None else [*params.layers, params.v_loss_layer]
    for layer in layers:
        if not 0 <= layer < model.num_layers:
            what = "layer" if layer in params.layers else "v_loss_layer"
            raise ValueError(f"{what} {layer} is out of range: the model has layers 0..{model.num_layers - 1}")
    for layer in params.layers:
        name = f"{model.modules.parameter_name(layer)}.weight"
        parameter = find_weight(model.hf, name).parameter  # None: quantised
        if parameter is not None and not torch.isfinite(parameter).all():
            raise ValueError(f"'{name}' holds NaN or infinite numbers")
        if needed:
            _check_moments(model, layer, moments)


def _check_moments(model: EditableModel, layer: int, moments: Moments | None) -> None:
    if moments is None:
        where = "ke.collect_moments; --moments, of `knowedit moments`"
        raise ValueError(f"moments are needed ({where}), or mom2_adjustment=False for ROME")
    if not isinstance(moments, Moments):
        raise TypeError(f"moments are a {type(moments).__name__}: expected Moments, see ke.collect_moments")
    if layer not in moments:
        raise ValueError(f"no moments of layer {layer}: there are those of {', '.join(map(str, moments.layers))}")
    if not torch.isfinite(moments.check(model, layer, originals(model)).matrix()).all():
        raise ValueError(f"moments of layer {layer} hold NaN or infinite numbers")
