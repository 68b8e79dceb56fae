"""`Edit`: what a method wants changed, as data. Applied, reverted bit for bit, saved, merged."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..model.identity import Checksums, differing_weights, fingerprint
from ..model.load import EditableModel
from ..runs.files import read_tensors, write_tensors
from ..runs.interrupts import uninterrupted
from .belongs import base_checksums, check_base
from .belongs import describe_model as describe_model

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
    if hasattr(module, "in_features") and hasattr(module, "out_features"):  # Linear, and its quantised kin
        return False
    raise TypeError(f"a down projection of type {type(module).__name__} cannot be edited: expected Linear or Conv1D")


@dataclass(eq=False)
class Edit:
    """Changes by parameter name: `LowRank` factors, or dense tensors in the parameter's own shape.

    method, requests, params, contexts, compat, seed: how it was made (seed: of contexts that were generated).
    model, base: what it belongs to: name, type and shapes, and checksums of the changed weights before any edit.
    keys: by layer the keys [d_in, requests] that it was solved with, for edits that come later (see `history`).
    """

    changes: dict[str, LowRank | torch.Tensor]
    method: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    contexts: list[Any] = field(default_factory=list)
    compat: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    base: Checksums = field(default_factory=dict)
    seed: int | None = None
    keys: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    def delta(self, name: str) -> torch.Tensor:
        """The dense change of a parameter, in its own shape."""
        if name not in self.changes:
            raise KeyError(f"the edit does not change '{name}': it changes {', '.join(self.changes)}")
        change = self.changes[name]
        return change.dense() if isinstance(change, LowRank) else change

    def summary(self) -> str:
        """Method, requests, the base's fingerprint and weights, a line each."""
        lines = [f"{self.method}: {len(self.requests)} requests, for {self.model.get('name', 'an unnamed model')}"]
        for request in self.requests[:10]:
            text = request["prompt"].replace("{}", request["subject"])
            lines.append(f"  {text} ->{request['target_new']}")
        if len(self.requests) > 10:
            lines.append(f"  ... and {len(self.requests) - 10} more")
        lines.append(f"  base: {fingerprint(self.base)[:16] if self.base else 'not recorded'}")
        for name, change in self.changes.items():
            rank = f"rank {change.inputs.shape[1]}" if isinstance(change, LowRank) else "dense"
            lines.append(f"  {name}: {rank}, norm {float(self.delta(name).norm()):.4g}")
        return "\n".join(lines)

    # -- on a model ------------------------------------------------------------------------------------------------

    def apply(self, model: EditableModel) -> None:
        """Add the changes to the model's weights (in float64, then rounded to the weights' dtype).

        What rounding to 16 bits takes away is logged (INFO), see `rounding`.
        A quantised weight stays as it is and gets a low-rank change as a side path: a forward hook on its module.
        """
        if any(edit is self for edit, _ in _applied(model)):
            raise ValueError("this edit is already applied to this model")
        targets = self._targets(model)
        check_base(self.base, self.model, model, originals(model))
        self._put(model, targets)

    def _put(self, model: EditableModel, targets: Mapping[str, nn.Parameter | nn.Module]) -> None:
        applied = _applied(model)
        undo: dict[str, Callable[[], None]] = {}
        try:
            for name, target in targets.items():
                if isinstance(target, nn.Parameter):
                    before = target.detach().clone()
                    undo[name] = partial(_put_back, target, before)
                    change = self.delta(name).to(target.device, torch.float64)
                    with torch.no_grad():
                        target.copy_(before.double() + change)
                    if target.dtype.itemsize < 4:
                        kind = str(target.dtype).removeprefix("torch.")
                        logger.info("'%s': %s takes %.2g of the change", name, kind, _lost(before, target, change))
                else:
                    undo[name] = target.register_forward_hook(_side_path(self.changes[name])).remove
            applied.append((self, undo))
        except BaseException:
            with uninterrupted():
                for step in undo.values():
                    step()
                applied[:] = [item for item in applied if item[0] is not self]
            raise

    def revert(self, model: EditableModel) -> None:
        """Take the edit back: the exact bits from before it, with edits applied since then applied again.

        An interrupt waits until that is done.
        """
        applied = _applied(model)
        at = next((n for n, (edit, _) in enumerate(applied) if edit is self), None)
        if at is None:
            raise ValueError("this edit is not applied to this model")
        later = [edit for edit, _ in applied[at + 1 :]]
        with uninterrupted():
            for _, undo in reversed(applied[at:]):
                for step in undo.values():
                    step()
            del applied[at:]
            for edit in later:
                edit._put(model, edit._targets(model))

    def bind(self, model: EditableModel) -> Edit:
        """Note that the edit belongs to `model`, less the edits applied to it. Returns the edit."""
        self.model, self.base = describe_model(model), base_checksums(model, self.changes, originals(model))
        return self

    @contextmanager
    def applied(self, model: EditableModel) -> Iterator[EditableModel]:
        """The model with the edit, inside a `with`."""
        self.apply(model)
        try:
            yield model
        finally:
            self.revert(model)

    def rounding(self, model: EditableModel) -> dict[str, float]:
        """For each weight |stored change - change| / |change|: what rounding to the weights' dtype takes away."""
        lost = {}
        for name, target in self._targets(model).items():
            if isinstance(target, nn.Parameter):
                before, change = target.detach().double(), self.delta(name).to(target.device, torch.float64)
                lost[name] = _lost(before, (before + change).to(target.dtype), change)
        return lost

    def _targets(self, model: EditableModel) -> dict[str, nn.Parameter | nn.Module]:
        """What changes: parameters, or modules whose weights are quantised. ValueError: made for another model."""
        found: dict[str, nn.Parameter | nn.Module] = {}
        known = dict(model.hf.named_parameters())
        for name, change in self.changes.items():
            parameter = known.get(name)
            if parameter is not None and parameter.is_meta:
                raise ValueError(f"'{name}' is offloaded: load the model with its edited layers in memory")
            if parameter is not None and parameter.is_floating_point():
                found[name], shape = parameter, tuple(parameter.shape)
            else:
                found[name], shape = self._quantised(model, name)
            if shape != _shape(change):
                raise ValueError(f"'{name}' is {list(shape)}, the edit is for {list(_shape(change))}: another model's")
        return found

    def _quantised(self, model: EditableModel, name: str) -> tuple[nn.Module, tuple[int, ...]]:
        try:
            module = model.hf.get_submodule(name.removesuffix(".weight"))
        except AttributeError:
            module = None
        if not hasattr(module, "weight") or not hasattr(module, "in_features"):
            raise ValueError(
                f"the model has no parameter '{name}': the edit was made for {self.model or 'another one'}"
            )
        if not isinstance(self.changes[name], LowRank):
            raise ValueError(f"'{name}' is quantised: only a low-rank change can stand beside it")
        return module, (module.out_features, module.in_features)

    # -- as data ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """One .safetensors file, atomically; everything but tensors is JSON in its metadata."""
        tensors: dict[str, torch.Tensor] = {}
        kinds = {}
        for name, change in self.changes.items():
            if isinstance(change, LowRank):
                kinds[name] = {"input_first": change.input_first}
                tensors[f"{name}.inputs"], tensors[f"{name}.outputs"] = change.inputs, change.outputs
            else:
                kinds[name] = {}
                tensors[f"{name}.dense"] = change
        tensors |= {f"keys.{layer}": keys for layer, keys in self.keys.items()}
        described = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("changes", "keys")}
        metadata = {
            "format": "knowedit_ext.edit.1",
            "edit": json.dumps({**described, "changes": kinds}, sort_keys=True),
        }
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != "knowedit_ext.edit.1":
            raise ValueError(f"'{path}' is no saved edit")
        changes: dict[str, LowRank | torch.Tensor] = {}
        try:
            described = json.loads(metadata["edit"])
            for name, kind in described.pop("changes").items():
                if kind:
                    changes[name] = LowRank(tensors[f"{name}.inputs"], tensors[f"{name}.outputs"], kind["input_first"])
                else:
                    changes[name] = tensors[f"{name}.dense"]
            keys = {int(n.removeprefix("keys.")): x for n, x in tensors.items() if n.startswith("keys.")}
            return cls(changes, **described, keys=keys)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{path}' has a broken description: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{path}' lacks part of the edit or has too much: {error}") from error

    def to_peft(self, folder: str | Path) -> None:
        """The edit as a LoRA adapter that `peft` loads (same logits); see `editing.peft`."""
        from .peft import to_peft

        to_peft(self, folder)

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
        method = "+".join(dict.fromkeys(edit.method for edit in edits))
        return cls(changes, method, requests, model=edits[0].model, base=_joint_base(edits), keys=_joint_keys(edits))


def _joint_keys(edits: Sequence[Edit]) -> dict[int, torch.Tensor]:
    """Of the layers that all edits keep keys of, side by side."""
    layers = set.intersection(*(set(edit.keys) for edit in edits))
    return {layer: torch.cat([edit.keys[layer] for edit in edits], 1) for layer in sorted(layers)}


def _joint_base(edits: Sequence[Edit]) -> Checksums:
    joint: Checksums = {}
    for edit in edits:
        common = joint.keys() & edit.base.keys()
        said = differing_weights(*({name: base[name] for name in common} for base in (joint, edit.base)))
        if said:
            raise ValueError(f"the edits were made for different bases: {'; '.join(said[:3])}")
        joint = edit.base | joint
    return joint


def _shape(change: LowRank | torch.Tensor) -> tuple[int, ...]:
    if not isinstance(change, LowRank):
        return tuple(change.shape)
    shape = (change.inputs.shape[0], change.outputs.shape[0])
    return shape if change.input_first else shape[::-1]


def _applied(model: EditableModel) -> list[tuple[Edit, dict[str, Callable[[], None]]]]:
    """Edits applied to this model, oldest first, each with the step that undoes it for each weight."""
    return model.__dict__.setdefault("applied_edits", [])


def originals(model: EditableModel) -> dict[str, torch.Tensor]:
    """The base model's weights by name, where edits applied to it have replaced them."""
    found: dict[str, torch.Tensor] = {}
    for _, undo in _applied(model):
        for name, step in undo.items():
            if isinstance(step, partial):
                found.setdefault(name, step.args[1])
    return found


@torch.no_grad()
def _lost(before: torch.Tensor, after: torch.Tensor, change: torch.Tensor) -> float:
    """|after - before - change| / |change|"""
    return float((after.double() - before.double() - change).norm() / change.norm().clamp_min(1e-300))


def _put_back(parameter: nn.Parameter, before: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(before)


def _side_path(change: LowRank) -> Callable[[nn.Module, tuple, torch.Tensor], torch.Tensor]:
    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        inputs, outputs = (x.to(output.device, output.dtype) for x in (change.inputs, change.outputs))
        return output + (args[0].to(output.dtype) @ inputs) @ outputs.T

    return hook
