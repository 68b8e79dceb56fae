"""The loop over layers of the closed-form editors: what is left to do is spread over them, bottom up.

The methods differ in their solve, see `Solve`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..model.load import EditableModel
from .edit import Edit
from .keys import KeyRows, bare_pass
from .residual import Adding
from .stacked import stacked
from .tokenized import TokenizedRequest
from .values import Rule

# (layer, keys [d_in, n], earlier keys, [d_in, m] an edit) -> [d_in, n], what the n residuals are multiplied by
Solve = Callable[[int, torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Aim:
    """What is to be put out by the last edited layer, how that is found, and how what is missing is divided.

    name: the method that values so found are called by, in folders that hold them.
    site: "layer" (the residual stream behind it) or "mlp" (what the MLP adds). beside, nll_factor, rule: of its
    optimisation, see `optimise_values`. divisor: of the residual, of the number of layers that are left.
    """

    name: str = "memit"
    site: str = "layer"
    beside: tuple[str, ...] = ()
    nll_factor: float = 1.0
    rule: Rule | None = None
    divisor: Callable[[int], float] = float  # Eqn. 20, MEMIT


def spread(
    model: EditableModel,
    edit: Edit,
    layers: Sequence[int],
    requests: Sequence[TokenizedRequest],
    weights: Sequence[float],
    values: torch.Tensor,
    earlier: Mapping[int, Sequence[torch.Tensor]],
    solve: Solve,
    aim: Aim,
    adding: Mapping[int, Adding] | None = None,
) -> None:
    """Add to `edit` a change of the down projection of each layer, so that the last one puts out `values` at the site.

    weights: of a request's contexts, in its key. values: [n, hidden]. earlier: by layer the keys [d_in, m] of each
    edit whose values are to be kept. adding: how each layer adds what its down projection puts out to what is aimed at;
    None: as it is. The edit keeps the keys of its own requests, in the float32 they are solved with.

    Each pass gives a layer's keys and the values reached so far, and starts from the first layer that has changed.
    Where noise is drawn anew for every pass, each of the two has passes of its own.
    """
    redrawn = any(request.stream for request in requests)
    rows = KeyRows(model, requests, weights)
    last = layers[-1]
    start, hidden = layers[0], rows.run(rows.start, 0, layers[0])
    with stacked(model, edit, layers) as put:
        for number, layer in enumerate(layers):
            if redrawn and number:
                rows = KeyRows(model, requests, weights)
                hidden, start = rows.start, 0
            if layer > start:  # the layer below has been changed since
                hidden, start = rows.run(hidden, start, layer), layer
            inputs, reached = rows.pass_through(hidden, layer, layer, last, aim.site)
            keys = rows.mean(inputs).float().T  # K, [d_in, n]
            edit.keys[layer] = keys.cpu()
            now = bare_pass(model, requests, last, aim.site)[1] if redrawn else rows.bare(reached)  # [n, hidden]
            residual = (values.to(now.device, torch.float64) - now) / aim.divisor(len(layers) - number)  # [n, hidden]
            if adding is not None:
                down, bare = model.modules.down_projection(layer), rows.bare(inputs)
                residual = adding[layer].change(down(bare.to(inputs.dtype)), residual)
            put(layer, solve(layer, keys.double(), earlier[layer]), residual.T)
