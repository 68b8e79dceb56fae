"""What some modules read in packed rows, and the loss's gradient at what they put out: one pass, from a layer on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from ..model.hooks import Hooks
from .packed import PackedPrompts

Rows = dict[str, tuple[torch.Tensor, torch.Tensor]]


def module_rows(
    packed: PackedPrompts,
    hidden: torch.Tensor,
    first: int,
    modules: Mapping[str, nn.Module],
    loss: Callable[[torch.Tensor], torch.Tensor],
    kept: torch.Tensor | None = None,
) -> tuple[float, Rows]:
    """hidden: rows entering layer `first`, below which no module lies; loss: of the rows behind the last layer.

    (loss, by module (what it reads [kept, d_in], gradient at what it puts out [kept, d_out])). kept: row numbers; None:
    all. Raises ValueError for a loss that is no finite number.
    """
    model = packed.model
    read: dict[str, torch.Tensor] = {}
    given: dict[str, torch.Tensor] = {}

    def rows_of(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().reshape(-1, x.shape[-1])
        return x if kept is None else x[kept.to(x.device)]

    def keep_input(name: str, args: tuple, _kwargs: dict) -> None:
        read[name] = rows_of(args[0])

    def keep_output(name: str, out: torch.Tensor) -> torch.Tensor:
        given[name] = out
        return out

    with torch.enable_grad(), Hooks() as hooks:
        for name, module in modules.items():
            hooks.before(module, partial(keep_input, name))
            hooks.behind(module, partial(keep_output, name))
        total = loss(packed.run(hidden.detach().requires_grad_(), first, model.num_layers))
        if not torch.isfinite(total):
            raise ValueError(f"the loss is {float(total)}: NaN or infinity in weights or activations")
        gradients = torch.autograd.grad(total, [given[name] for name in modules])
    return float(total.detach()), {n: (read[n], rows_of(g)) for n, g in zip(modules, gradients, strict=True)}
