"""A change of a weight, as data: low-rank factors or a dense tensor; what is wrong with one is said before its use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..checks import quoted
from ..model.identity import checksum
from ..model.weights import WRITABLE


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change of a linear map: what goes in along `inputs` [d_in, r] comes out along `outputs` [d_out, r].

    input_first: the parameter is [d_in, d_out] (transformers' Conv1D) and not [d_out, d_in] (Linear).
    Raises ValueError for factors that are not finite matrices in floating point, of one rank.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    input_first: bool

    def __post_init__(self) -> None:
        for side in ("inputs", "outputs"):
            factor = getattr(self, side)
            check_tensor(factor, f"the factor `{side}` of a low-rank change")
            if factor.dim() != 2 or not factor.numel():
                raise ValueError(f"`{side}` of a low-rank change must be [d, rank], got {list(factor.shape)}")
        if self.inputs.shape[1] != self.outputs.shape[1]:
            ranks = f"{self.inputs.shape[1]} and {self.outputs.shape[1]}"
            raise ValueError(f"the factors of a low-rank change are of rank {ranks}: they must be of one")
        if not isinstance(self.input_first, bool):
            raise TypeError(f"input_first is {self.input_first!r}: expected True or False")

    @property
    def rank(self) -> int:
        return self.inputs.shape[1]

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The change in the parameter's own shape."""
        left, right = (self.inputs, self.outputs) if self.input_first else (self.outputs, self.inputs)
        dtype = dtype or torch.promote_types(left.dtype, right.dtype)
        return left.to(dtype) @ right.to(dtype).T


Change: TypeAlias = "LowRank | torch.Tensor"


def check_tensor(tensor: object, what: str) -> None:
    """TypeError for what is no tensor, ValueError for one that is not made of finite numbers in floating point."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{what} is a {type(tensor).__name__}: expected a tensor")
    if tensor.dtype not in WRITABLE or tensor.layout is not torch.strided:
        raise ValueError(f"{what} is {tensor.dtype}, {tensor.layout}: expected a dense tensor in floating point")
    if tensor.is_meta:
        raise ValueError(f"{what} is on the meta device: it has no numbers")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} holds NaN or infinite numbers")


def check_changes(changes: Mapping[str, Change]) -> None:
    """Errors as of `check_tensor`, with the weight's name; tensors may have been written to since they were given."""
    if not isinstance(changes, Mapping):
        kind = type(changes).__name__
        raise TypeError(f"changes are a {kind}: expected {{name of a weight: LowRank factors or a tensor}}")
    for name, change in changes.items():
        if not isinstance(name, str):
            raise TypeError(f"changes go by the names of weights, got {name!r}")
        what = f"the change of {quoted(name)}"
        if isinstance(change, LowRank):
            check_tensor(change.inputs, f"{what} (inputs)")
            check_tensor(change.outputs, f"{what} (outputs)")
        elif not isinstance(change, torch.Tensor):
            raise TypeError(f"{what} is a {type(change).__name__}: expected LowRank factors or a tensor")
        else:
            check_tensor(change, what)


def shape_of(change: Change) -> tuple[int, ...]:
    """Of the parameter that it is for."""
    if not isinstance(change, LowRank):
        return tuple(change.shape)
    shape = (change.inputs.shape[0], change.outputs.shape[0])
    return shape if change.input_first else shape[::-1]


def dense(change: Change, dtype: torch.dtype | None = None) -> torch.Tensor:
    return change.dense(dtype) if isinstance(change, LowRank) else change.to(dtype)


def exactly_zero(change: Change) -> bool:
    return not all(bool(x.any()) for x in (_tensors(change)))


def largest(change: Change) -> float:
    """No entry of the change is larger (for factors: by Cauchy and Schwarz)."""
    if isinstance(change, LowRank):
        inputs, outputs = (torch.linalg.vector_norm(x.double(), dim=1).max() for x in _tensors(change))
        return float(inputs * outputs)
    return float(change.abs().max()) if change.numel() else 0.0


def in_float32(name: str, change: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, outputs) in float32. ValueError for numbers beyond it."""
    inputs, outputs = (x.float() for x in _tensors(change))
    if not bool(inputs.isfinite().all() and outputs.isfinite().all()):
        raise ValueError(f"the change of {quoted(name)} has numbers beyond float32")
    return inputs, outputs


def digest(changes: Mapping[str, Change]) -> str:
    """SHA-256 of all names and numbers: equal for an edit and its copy from a file. Errors as of `check_changes`."""
    check_changes(changes)
    checksums = [
        [name, [[str(x.dtype), list(x.shape), checksum(x)] for x in _tensors(change)]]
        for name, change in sorted(changes.items())
    ]
    return hashlib.sha256(json.dumps(checksums).encode()).hexdigest()


def _tensors(change: Change) -> tuple[torch.Tensor, ...]:
    return (change.inputs, change.outputs) if isinstance(change, LowRank) else (change,)
