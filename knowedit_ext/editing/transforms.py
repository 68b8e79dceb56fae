"""What is made of an edit when it is there already: RECT and PRUNE restrain how far it goes.

`compat="reference"` is what AlphaEdit's repository runs under these names (memit_rect_main.py, evaluate.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..checks import Compat, Share, typed
from ..model.load import EditableModel
from .belongs import check_base
from .changes import Change, LowRank, dense
from .edit import Edit, originals
from .placing import weights_of

EPSILON = 1e-8


@typed
@torch.no_grad()
def rect(model: EditableModel, edit: Edit, keep: Share = 0.4, compat: Compat = None) -> Edit:
    """The edit with the share `keep` of each weight's entries that change most for their size (Gu et al. 2024).

    Changes are measured by the weights before any edit; "reference": by those of the model as it is, with the edits
    applied to it. The changes become dense.
    """
    before = _weights(model, edit, now=compat is not None)
    changes: dict[str, Change] = {}
    for name, change in edit.changes.items():
        whole = dense(change, torch.float64)
        weight = before[name].to(whole)
        relative = (whole / weight).abs() if compat is None else (whole / (weight + EPSILON)).abs()
        relative = relative.nan_to_num(nan=0.0, posinf=torch.inf)  # 0 / 0: no change of what is nothing
        least = relative.flatten().kthvalue(max(1, int(relative.numel() * (1 - keep)))).values
        changes[name] = torch.where(relative >= least, whole, 0.0)
    return _made(edit, changes, "rect", compat).bind(model)


@typed
@torch.no_grad()
def prune(model: EditableModel, edit: Edit, compat: Compat = None) -> Edit:
    """The edit with its singular values s above a weight's largest one, m, made m + log(s / m) (Ma et al. 2025).

    edit: all that was done to the model, `Edit.merge` of a sequence; the result takes its place. "reference": as
    released, the restrained change comes on top of the edit itself, which is to say it is larger than without PRUNE.
    """
    before = _weights(model, edit)
    changes: dict[str, Change] = {}
    for name, change in edit.changes.items():
        most = torch.linalg.matrix_norm(before[name].double(), 2).cpu()
        changes[name] = _restrained(change, most, added=compat is not None)
    return _made(edit, changes, "prune", compat).bind(model)


def _restrained(change: Change, most: torch.Tensor, added: bool) -> Change:
    if not isinstance(change, LowRank):
        u, s, vh = torch.linalg.svd(change.double(), full_matrices=False)
        return (u * _shorter(s, most, added)) @ vh
    (q, r), (p, t) = (torch.linalg.qr(each.double()) for each in (change.inputs, change.outputs))
    u, s, vh = torch.linalg.svd(r @ t.T)  # of inputs @ outputs.T
    return LowRank(q @ u * _shorter(s, most, added), p @ vh.T, change.input_first)


def _shorter(s: torch.Tensor, most: torch.Tensor, added: bool) -> torch.Tensor:
    restrained = torch.where(s > most, most + (s / most).log(), s)
    return s + restrained if added else restrained


def _weights(model: EditableModel, edit: Edit, now: bool = False) -> dict[str, torch.Tensor]:
    """The weights that the edit changes, before any edit or as they are now. ValueError where it is another model's."""
    base = originals(model)
    weights = {name: weight.parameter for name, weight in weights_of(model, edit.changes, edit.model).items()}
    check_base(edit.base, edit.model, model, base)
    for name, weight in weights.items():
        if weight is None:
            raise ValueError(f"'{name}' is quantised: RECT and PRUNE measure changes by the weight in floating point")
    return weights if now else weights | {name: weight for name, weight in base.items() if name in weights}


def _made(edit: Edit, changes: dict[str, Change], name: str, compat: str | None) -> Edit:
    return replace(edit, changes=changes, method=f"{edit.method}+{name}", compat=compat or edit.compat, parts=[])
