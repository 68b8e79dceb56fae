"""The keys of earlier edits, which a new edit is to leave as they are.

An edit keeps the keys that it was solved with (`Edit.keys`). History is what is handed over as `earlier`, no more: an
edit that was taken back since is left out by the caller, and its keys no longer count; edits that were made while it
was in place stay as they were computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..model.identity import Checksums
from ..model.load import EditableModel
from ..moments.forward import key_width
from .belongs import check_base
from .edit import Edit, originals


def earlier_edits(model: EditableModel, earlier: Edit | Iterable[Edit]) -> list[Edit]:
    """The edits, once all are sure to belong to the model; TypeError, ValueError that says which does not."""
    edits = [earlier] if isinstance(earlier, Edit) else list(earlier)
    known: list[tuple[Checksums, dict[str, Any]]] = []  # bases that were compared with the model's weights
    for number, edit in enumerate(edits):
        if not isinstance(edit, Edit):
            raise TypeError(f"earlier[{number}] is a {type(edit).__name__}: expected an Edit")
        if (edit.base, edit.model) not in known:
            try:
                check_base(edit.base, edit.model, model, originals(model))
            except ValueError as error:
                raise ValueError(f"{_name(edit, number)}: {error}") from error
            known.append((edit.base, edit.model))
    return edits


def earlier_keys(
    model: EditableModel, earlier: Edit | Iterable[Edit], layers: Sequence[int]
) -> dict[int, list[torch.Tensor]]:
    """By layer the keys [d_in, m] of each earlier edit, in their order, as the edits keep them.

    Raises ValueError for another model's edit, one without keys at a layer, with keys of another width or not finite.
    """
    edits = earlier_edits(model, earlier)
    widths = {layer: key_width(model, layer) for layer in layers}
    return {
        layer: [_keys_of(edit, number, layer, width) for number, edit in enumerate(edits)]
        for layer, width in widths.items()
    }


def _name(edit: Edit, number: int) -> str:
    return f"earlier[{number}] ({edit.method or 'an edit'} of {len(edit.requests)} requests)"


def _keys_of(edit: Edit, number: int, layer: int, width: int) -> torch.Tensor:
    name, keys = _name(edit, number), edit.keys.get(layer)
    if keys is None:
        there = f"it has those of {', '.join(map(str, edit.keys))}" if edit.keys else "it keeps none"
        raise ValueError(f"{name} has no keys of layer {layer}: {there}; edits by closed-form methods keep them")
    if keys.dim() != 2 or len(keys) != width:
        raise ValueError(f"{name} has keys {list(keys.shape)} at layer {layer}: not [{width}, n], another model's?")
    if not torch.isfinite(keys).all():
        raise ValueError(f"{name} has keys at layer {layer} that are not finite")
    return keys
