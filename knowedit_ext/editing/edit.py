"""`Edit`: what a method wants changed, as data. Applied, reverted bit for bit, saved, merged."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..files import atomic_write
from ..model import EditableModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change of a linear map: what goes in along `inputs` [d_in, r] comes out along `outputs` [d_out, r].

    input_first: the parameter is [d_in, d_out] (transformers' Conv1D) and not [d_out, d_in] (Linear).
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    input_first: bool

    def dense(self) -> torch.Tensor:
        """The change in the parameter's own shape."""
        left, right = (self.inputs, self.outputs) if self.input_first else (self.outputs, self.inputs)
        return left @ right.T


def weight_is_input_first(module: nn.Module) -> bool:
    """[d_in, d_out] (Conv1D) or [d_out, d_in] (Linear), by module type: shapes do not tell for square weights."""
    if type(module).__name__ == "Conv1D":
        return True
    if isinstance(module, nn.Linear):
        return False
    raise TypeError(f"a down projection of type {type(module).__name__} cannot be edited: expected Linear or Conv1D")


@dataclass(eq=False)
class Edit:
    """Changes by parameter name: `LowRank` factors, or dense tensors in the parameter's own shape.

    method, requests, params, contexts, compat: how it was made. model: name, type and shapes of what it belongs to.
    """

    changes: dict[str, LowRank | torch.Tensor]
    method: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    contexts: list[Any] = field(default_factory=list)
    compat: str | None = None
    model: dict[str, Any] = field(default_factory=dict)

    def delta(self, name: str) -> torch.Tensor:
        """The dense change of a parameter, in its own shape."""
        if name not in self.changes:
            raise KeyError(f"the edit does not change '{name}': it changes {', '.join(self.changes)}")
        change = self.changes[name]
        return change.dense() if isinstance(change, LowRank) else change

    # -- on a model ------------------------------------------------------------------------------------------------

    def apply(self, model: EditableModel) -> None:
        """Add the changes to the model's weights (in float64, then rounded to the weights' dtype)."""
        applied = _applied(model)
        if any(edit is self for edit, _ in applied):
            raise ValueError("this edit is already applied to this model")
        parameters = self._parameters(model)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    change = self.delta(name).to(parameter.device, torch.float64)
                    parameter.copy_(parameter.double() + change)
        except BaseException:
            _put_back(parameters, before)
            raise
        applied.append((self, before))

    def revert(self, model: EditableModel) -> None:
        """Take the edit back: the exact bits from before it, with edits applied since then applied again."""
        applied = _applied(model)
        at = next((n for n, (edit, _) in enumerate(applied) if edit is self), None)
        if at is None:
            raise ValueError("this edit is not applied to this model")
        later = [edit for edit, _ in applied[at + 1 :]]
        for edit, before in reversed(applied[at:]):
            _put_back(edit._parameters(model), before)
        del applied[at:]
        for edit in later:
            edit.apply(model)

    @contextmanager
    def applied(self, model: EditableModel) -> Iterator[EditableModel]:
        """The model with the edit, inside a `with`."""
        self.apply(model)
        try:
            yield model
        finally:
            self.revert(model)

    def _parameters(self, model: EditableModel) -> dict[str, nn.Parameter]:
        """The parameters that change. Raises ValueError where the edit belongs to another model."""
        known = dict(model.hf.named_parameters())
        for name, change in self.changes.items():
            if name not in known:
                raise ValueError(
                    f"the model has no parameter '{name}': the edit was made for {self.model or 'another one'}"
                )
            shape = _shape(change)
            if tuple(known[name].shape) != shape:
                raise ValueError(
                    f"'{name}' is {list(known[name].shape)}, the edit is for {list(shape)}: made for another model"
                )
            if known[name].is_meta:
                raise ValueError(f"'{name}' is offloaded: load the model with its edited layers in memory")
        return {name: known[name] for name in self.changes}

    # -- as data ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """One .safetensors file, atomically; everything but tensors is JSON in its metadata."""
        tensors: dict[str, torch.Tensor] = {}
        kinds = {}
        for name, change in self.changes.items():
            if isinstance(change, LowRank):
                kinds[name] = {"input_first": change.input_first}
                tensors[f"{name}.inputs"] = change.inputs.detach().cpu().contiguous()
                tensors[f"{name}.outputs"] = change.outputs.detach().cpu().contiguous()
            else:
                kinds[name] = {}
                tensors[f"{name}.dense"] = change.detach().cpu().contiguous()
        described = {k: getattr(self, k) for k in ("method", "requests", "params", "contexts", "compat", "model")}
        metadata = {
            "format": "knowedit_ext.edit.1",
            "edit": json.dumps({**described, "changes": kinds}, sort_keys=True),
        }
        content = save(tensors, metadata=metadata)
        atomic_write(path, lambda file: file.write(content))

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"'{path}' is not a readable .safetensors file: {error}") from error
        if metadata.get("format") != "knowedit_ext.edit.1":
            raise ValueError(f"'{path}' is no saved edit")
        described = json.loads(metadata["edit"])
        changes: dict[str, LowRank | torch.Tensor] = {}
        for name, kind in described.pop("changes").items():
            if kind:
                changes[name] = LowRank(tensors[f"{name}.inputs"], tensors[f"{name}.outputs"], kind["input_first"])
            else:
                changes[name] = tensors[f"{name}.dense"]
        return cls(changes, **described)

    @classmethod
    def merge(cls, edits: Sequence[Edit]) -> Edit:
        """The sum of edits of one model."""
        if not edits:
            raise ValueError("no edits to merge")
        names = list(dict.fromkeys(name for edit in edits for name in edit.changes))
        changes: dict[str, LowRank | torch.Tensor] = {}
        for name in names:
            parts = [edit.changes[name] for edit in edits if name in edit.changes]
            if len({_shape(part) for part in parts}) > 1:
                raise ValueError(f"the edits change '{name}' in different shapes: they belong to different models")
            if all(isinstance(part, LowRank) for part in parts):
                inputs, outputs = (torch.cat([getattr(p, k).double() for p in parts], 1) for k in ("inputs", "outputs"))
                changes[name] = LowRank(inputs, outputs, parts[0].input_first)
            else:
                changes[name] = sum(edit.delta(name).double() for edit in edits if name in edit.changes)
        requests = [request for edit in edits for request in edit.requests]
        return cls(changes, "+".join(dict.fromkeys(edit.method for edit in edits)), requests, model=edits[0].model)


def describe_model(model: EditableModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "type": model.modules.model_type,
        "layers": model.num_layers,
        "hidden": model.hidden_size,
    }


def _shape(change: LowRank | torch.Tensor) -> tuple[int, ...]:
    if not isinstance(change, LowRank):
        return tuple(change.shape)
    shape = (change.inputs.shape[0], change.outputs.shape[0])
    return shape if change.input_first else shape[::-1]


def _applied(model: EditableModel) -> list[tuple[Edit, dict[str, torch.Tensor]]]:
    """Edits applied to this model, oldest first, each with the weights from before it."""
    return model.__dict__.setdefault("applied_edits", [])


def _put_back(parameters: Mapping[str, nn.Parameter], before: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in before.items():
            parameters[name].copy_(value)
