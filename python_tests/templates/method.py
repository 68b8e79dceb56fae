"""An editing method that does nothing: copy it to `knowedit_ext/editing/methods/<name>.py` to begin with another.

It adds the same rank-one change to the down projection of each layer, of `size`, whatever the requests are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from knowedit_ext.checks import Compat, typed
from knowedit_ext.editing.edit import Edit
from knowedit_ext.editing.method import Method
from knowedit_ext.editing.params import LayerParams
from knowedit_ext.editing.request import EditRequest, check_requests
from knowedit_ext.editing.stacked import stacked
from knowedit_ext.model.hooks import at_rest
from knowedit_ext.model.load import EditableModel


@dataclass(frozen=True)
class NothingParams(LayerParams):
    """size: of the change."""

    size: float = 1e-3

    presets: ClassVar[dict[str, dict[str, Any]]] = {"world": dict(layers=(1,))}


@at_rest
@typed
def nothing(
    model: EditableModel,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    params: NothingParams,
    *,
    compat: Compat = None,
) -> Edit:
    """A change that answers no request. Raises ValueError for bad requests before anything is computed."""
    checked = check_requests(requests)
    edit = Edit({}, METHOD.name, [request.to_dict() for request in checked], params.to_dict(), [], compat)
    with stacked(model, edit, params.layers) as put:
        for layer in params.layers:
            projection = model.modules.down_projection(layer)
            d_in, d_out = (
                projection.weight.shape if type(projection).__name__ == "Conv1D" else projection.weight.shape[::-1]
            )
            put(layer, torch.full((d_in, 1), params.size), torch.ones(d_out, 1))
    return edit


METHOD = Method("nothing", "a change that answers no request", nothing, NothingParams)
