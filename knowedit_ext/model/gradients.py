"""Does a gradient pass the model's layers? Some quantised products are for inference alone, and say nothing."""

from __future__ import annotations

import torch
from torch import nn

from .families import device_of
from .hooks import resting
from .load import EditableModel
from .weights import is_plain


def check_gradients(model: EditableModel, first: int, after: int) -> None:
    """ValueError, by name, for a quantised linear map of layers [first, after) or the head that passes no gradient on.

    Plain weights do. Each of the others is asked with one row, after a row without gradients: at that one bitsandbytes
    packs its weights for a CPU, and from then on gives none.
    """
    names = {id(module): name for name, module in model.hf.named_modules()}
    for part in (*model.modules.layers[first:after], model.modules.head):
        for module in part.modules():
            if isinstance(getattr(module, "in_features", None), int) and not _is_plain(module):
                _check(model, module, names[id(module)])


def _is_plain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and is_plain(weight)


def _check(model: EditableModel, module: nn.Module, name: str) -> None:
    row = torch.ones(1, module.in_features, dtype=model.dtype, device=device_of(module) or model.device)
    with resting(model):
        module(row)
        reason = "it gives none"
        gradient = None
        try:
            with torch.enable_grad():
                asked = row.clone().requires_grad_()
                answer = module(asked)
                if answer.requires_grad:
                    (gradient,) = torch.autograd.grad(answer.sum(), asked, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error)
    if gradient is None or not bool(gradient.any()):
        raise ValueError(
            f"no gradient passes '{name}' ({type(module).__name__} on {row.device}: {reason}), so what is optimised "
            "below it would not move: load the model in floating point, or where its quantised products have gradients "
            "(on a GPU)"
        )
