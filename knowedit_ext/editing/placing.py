"""Changes put in force on a model and taken back: written into its weights, or beside those that cannot be written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..model.load import EditableModel
from ..model.weights import NoSuchWeightError, Weight, find_weight
from ..model.wrappers import forget_compiled
from ..runs.checksums import checksum
from .changes import Change, LowRank, check_changes, dense, exactly_zero, in_float32, largest, shape_of
from .probe import Probe

logger = logging.getLogger(__name__)


@dataclass
class Placed:
    """What an edit in force has replaced, by weight, what it left there, and the steps that take it back."""

    before: dict[str, torch.Tensor] = field(default_factory=dict)
    left: dict[str, tuple[nn.Parameter, torch.dtype, str]] = field(default_factory=dict)  # and its checksum
    undo: list[Callable[[], None]] = field(default_factory=list)

    def take_back(self) -> None:
        for step in reversed(self.undo):
            step()


def check_untouched(model: EditableModel, latest_first: Iterable[Placed]) -> None:
    """ValueError where a weight is not what the latest change of it left: taking that back would undo more."""
    seen: set[str] = set()
    for placed in latest_first:
        for name, (parameter, dtype, left) in placed.left.items():
            if name in seen:
                continue
            seen.add(name)
            replaced = find_weight(model.hf, name).parameter is not parameter
            if replaced or (parameter.dtype == dtype and checksum(parameter) != left):  # another dtype: rounded
                raise ValueError(
                    f"'{name}' was {'replaced' if replaced else 'changed'} since the edit was applied (trained, loaded "
                    "or merged?), and taking the edit back would undo that too: force=True does it all the same"
                )


def weights_of(
    model: EditableModel, changes: Mapping[str, Change], made_for: Mapping[str, Any] | None = None
) -> dict[str, Weight]:
    """Where each change goes. ValueError: a change is not sound, is another model's, or too large for the weight.

    made_for: what the edit says it was made for, for the message. Nothing is written.
    """
    check_changes(changes)
    return {name: _weight_of(model, name, change, made_for) for name, change in changes.items()}


def _weight_of(model: EditableModel, name: str, change: Change, made_for: Mapping[str, Any] | None) -> Weight:
    try:
        weight = find_weight(model.hf, name)
    except NoSuchWeightError as error:
        raise ValueError(f"{error}: the edit was made for {made_for or 'another one'}") from None
    shape = shape_of(change)
    if shape != weight.shape:
        raise ValueError(f"'{name}' is {list(weight.shape)}, the edit is for {list(shape)}: another model's")
    if isinstance(change, LowRank) and weight.input_first not in (None, change.input_first):
        order = "[d_in, d_out]" if weight.input_first else "[d_out, d_in]"
        raise ValueError(f"the edit takes '{name}' the wrong way round: it is {order}")
    if weight.parameter is not None:
        _check_fits(weight.parameter, change, name)
    elif isinstance(change, LowRank):
        in_float32(name, change)
    else:
        raise ValueError(f"'{name}' is quantised: only a low-rank change can stand beside it")
    return weight


@torch.no_grad()
def _check_fits(parameter: nn.Parameter, change: Change, name: str) -> None:
    bound = float(parameter.abs().max()) + largest(change) if parameter.numel() else 0.0
    if bound < torch.finfo(parameter.dtype).max:  # what nearly all are
        return
    if not bool(parameter.isfinite().all()):
        raise ValueError(f"'{name}' holds NaN or infinite numbers")
    changed = parameter.double() + dense(change, torch.float64).to(parameter.device)
    if not bool(changed.to(parameter.dtype).isfinite().all()):
        kind, most = str(parameter.dtype).removeprefix("torch."), torch.finfo(parameter.dtype).max
        raise ValueError(f"the change of '{name}' is too large: the sum goes beyond what {kind} holds ({most:.5g})")


def place(
    model: EditableModel, weights: Mapping[str, Weight], changes: Mapping[str, Change], placed: Placed, probe: bool
) -> None:
    """Put all changes in force, noting in `placed` how to take them back. The caller does that where this raises.

    probe: look whether the model computes with each changed weight. ValueError where it does not, and where nothing at
    all of the changes is left by rounding to the weights' dtypes.
    """
    moved = all(map(exactly_zero, changes.values()))  # then there is nothing to lose
    for name, weight in weights.items():
        change = changes[name]
        exact = exactly(change, weight)
        looking = Probe(weight, exact, model) if probe else None
        if isinstance(exact, LowRank):
            placed.undo.append(weight.module.register_forward_hook(_side_path(name, exact)).remove)
            placed.undo.append(forget_compiled)
            forget_compiled()
            moved = True
        else:
            moved |= _write(name, weight.parameter, exact, placed)
        if looking is not None:
            looking.check(placed.before.get(name))
    if not moved:
        raise ValueError(
            f"the edit changes nothing: rounding to {model.dtype} takes away all of the change of {', '.join(weights)}"
        )


@torch.no_grad()
def _write(name: str, parameter: nn.Parameter, exact: torch.Tensor, placed: Placed) -> bool:
    """Whether any entry is another one now. The sum is rounded once, from float64."""
    before = parameter.detach().clone()
    placed.before[name] = before
    placed.undo.append(partial(_put_back, parameter, before))
    parameter.copy_(before.double() + exact)
    placed.left[name] = parameter, parameter.dtype, checksum(parameter)
    if parameter.dtype.itemsize < 4:
        kind = str(parameter.dtype).removeprefix("torch.")
        logger.info("'%s': %s takes %.2g of the change", name, kind, lost(before, parameter, exact))
    return not torch.equal(before, parameter)


def exactly(change: Change, weight: Weight) -> Change:
    """What is added to a weight, in float64; of a change beside one the factors as they are."""
    return change if weight.parameter is None else dense(change, torch.float64).to(weight.parameter.device)


@torch.no_grad()
def lost(before: torch.Tensor, after: torch.Tensor, change: torch.Tensor) -> float:
    """|after - before - change| / |change|"""
    return float((after.double() - before.double() - change).norm() / change.norm().clamp_min(1e-300))


def _put_back(parameter: nn.Parameter, before: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(before)


def _side_path(name: str, change: LowRank) -> Callable[[nn.Module, tuple, torch.Tensor], torch.Tensor]:
    """Adds the change to what a module puts out, in float32 at least, rounded once."""
    factors = in_float32(name, change)

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        kind = torch.promote_types(output.dtype, torch.float32)
        inputs, outputs = (x.to(output.device, kind) for x in factors)
        added = (args[0].to(output.device, kind) @ inputs) @ outputs.T
        return (output.to(kind) + added).to(output.dtype)

    return hook
