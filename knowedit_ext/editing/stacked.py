"""Edits of several layers: each layer's change is computed with those below it in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from ..model.load import EditableModel
from .edit import Edit, LowRank, weight_is_input_first


@contextmanager
def stacked(
    model: EditableModel, edit: Edit, layers: Sequence[int]
) -> Iterator[Callable[[int, torch.Tensor, torch.Tensor], None]]:
    """Gives put(layer, inputs, outputs), which adds a change of that layer's down projection to `edit`.

    The change is in place from then on (that of the last layer is not needed); at the end the model is as it was, and
    the edit knows it.
    """

    def put(layer: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        module = model.modules.down_projection(layer)
        name = f"{model.modules.parameter_name(layer)}.weight"
        edit.changes[name] = LowRank(inputs.cpu(), outputs.cpu(), weight_is_input_first(module))
        if layer != layers[-1]:
            stack.enter_context(Edit({name: edit.changes[name]}).applied(model))

    with ExitStack() as stack:
        yield put
    edit.bind(model)
