"""`Edit`: what a method wants changed, as data. Applied, reverted bit for bit, saved, merged."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import torch

from ..checks import quoted, typed
from ..model.identity import Checksums, differing_weights, fingerprint
from ..model.load import EditableModel
from ..model.weights import Weight
from ..model.weights import weight_is_input_first as weight_is_input_first
from ..notebook import html_table
from ..runs.files import read_tensors, write_tensors
from ..runs.interrupts import uninterrupted, whole_contexts
from .belongs import base_checksums, check_base
from .belongs import describe_model as describe_model
from .changes import Change, LowRank, check_changes, check_tensor, dense, digest, exactly_zero, shape_of
from .peft import to_peft
from .placing import Placed, check_untouched, exactly, lost, place, weights_of
from .running import Running

# What the fields of a saved edit are.
_KINDS: dict[str, Any] = dict.fromkeys(("requests", "contexts", "parts"), list) | dict.fromkeys(
    ("params", "model", "base"), dict
)
_KINDS |= {"method": str, "compat": (str, type(None)), "seed": (int, type(None))}
_AS_TENSORS = ("changes", "keys", "statistics")


@dataclass
class Applied:
    """An edit in force: parts: digests of all that it is the sum of."""

    edit: Edit
    parts: frozenset[str]
    placed: Placed


@dataclass(eq=False)
class Edit:
    """Changes by parameter name: `LowRank` factors, or dense tensors in the parameter's own shape.

    method, requests, params, contexts, compat, seed: how it was made (seed: of contexts that were generated).
    model, base: what it belongs to: name, type and shapes, and checksums of the changed weights before any edit.
    keys: by layer the keys [d_in, requests] that it was solved with, for edits that come later (see `history`).
    statistics: by module what UltraEdit saw there [3, d_in + d_out], see `running`.
    parts: of a merged edit, digests of the edits it is the sum of.

    Raises ValueError or TypeError for changes that are not finite numbers in floating point, see `LowRank`.
    """

    changes: dict[str, Change]
    method: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    contexts: list[Any] = field(default_factory=list)
    compat: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    base: Checksums = field(default_factory=dict)
    seed: int | None = None
    keys: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)
    statistics: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_changes(self.changes)
        for key, kind in _KINDS.items():
            if not isinstance(getattr(self, key), kind):
                raise TypeError(f"its {key} is {brief(getattr(self, key))}")
        for request in self.requests:
            if not isinstance(request, dict) or not all(
                isinstance(request.get(key), str | None) for key in ("prompt", "subject")
            ):
                raise TypeError(f"one of its requests is {brief(request)}")
        for name, row in self.base.items():
            if not isinstance(row, list) or len(row) < 3 or not all(isinstance(part, str) for part in row):
                raise TypeError(f"the checksums of {quoted(name)} are {brief(row)}")
        for layer, keys in self.keys.items():
            check_tensor(keys, f"the keys of layer {layer}")
        for name, seen in self.statistics.items():
            check_tensor(seen, f"the statistics of {quoted(name)}")

    def delta(self, name: str) -> torch.Tensor:
        """The dense change of a parameter, in its own shape."""
        if name not in self.changes:
            raise KeyError(f"the edit does not change {quoted(name)}: it changes {', '.join(self.changes)}")
        return dense(self.changes[name])

    def __repr__(self) -> str:
        size = f"{_counted(len(self.requests), 'request')}, {_counted(len(self.changes), 'weight')}"
        return f"Edit({self.method or 'of no method'}, {size} of {self.model.get('name', 'an unnamed model')})"

    def summary(self) -> str:
        """Method, requests, the base's fingerprint and weights, a line each."""
        asked = _counted(len(self.requests), "request")
        lines = [f"{self.method}: {asked}, for {self.model.get('name', 'an unnamed model')}"]
        for request in self.requests[:10]:
            text = request["prompt"].replace("{}", request["subject"])
            lines.append(f"  {text} ->{request['target_new']}")
        if len(self.requests) > 10:
            lines.append(f"  ... and {len(self.requests) - 10} more")
        lines.append(f"  base: {fingerprint(self.base)[:16] if self.base else 'not recorded'}")
        for name, change in self.changes.items():
            rank = f"rank {change.rank}" if isinstance(change, LowRank) else "dense"
            lines.append(f"  {name}: {rank}, norm {float(self.delta(name).norm()):.4g}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What was asked for and which weights change, in a notebook."""
        asked = [[r["prompt"].replace("{}", r["subject"]), r.get("target_true") or "", r.get("target_new", "")]
                 for r in self.requests if r.get("prompt") and r.get("subject")]  # fmt: skip
        more = "" if len(asked) <= 10 else f" (the first 10 of {len(asked)})"
        changed = [
            [name, f"rank {change.rank}" if isinstance(change, LowRank) else "dense", float(self.delta(name).norm())]
            for name, change in self.changes.items()
        ]
        return html_table(f"{self!r}{more}", ["prompt", "before", "after"], asked[:10]) + html_table(
            "weights", ["weight", "change", "norm"], changed
        )

    # -- on a model ------------------------------------------------------------------------------------------------

    @typed
    def apply(self, model: EditableModel) -> None:
        """Add the changes to the model's weights (in float64, then rounded to the weights' dtype).

        What rounding to 16 bits takes away is logged (INFO), see `rounding`.
        A quantised weight stays as it is and gets a low-rank change as a side path: a forward hook on its module.

        All is checked before a weight is touched. ValueError: another model's edit, one that is applied already (also
        as part of a sum, or to the same Hugging Face model loaded twice), changes that are not sound or too large for
        a weight's dtype, offloaded weights; and where the model turns out not to compute with a changed weight, which
        is then as it was.
        """
        weights = self._weights(model)
        self.check_not_applied(model)
        check_base(self.base, self.model, model, originals(model))
        with whole_contexts():
            self._put(model, weights, probe=True)

    def check_not_applied(self, model: EditableModel) -> None:
        """ValueError where the edit is in force already."""
        own = self._own_parts()
        for applied in model.applied_edits:
            if applied.edit is self or applied.parts & own:
                raise ValueError("this edit is already applied to this model, or a sum is that holds it")

    def _weights(self, model: EditableModel) -> dict[str, Weight]:
        return weights_of(model, self.changes, self.model)

    def _put(self, model: EditableModel, weights: Mapping[str, Weight], probe: bool) -> None:
        placed = Placed()
        try:
            place(model, weights, self.changes, placed, probe)
            model.applied_edits.append(Applied(self, self._own_parts(), placed))
        except BaseException:
            with uninterrupted():
                placed.take_back()
                model.applied_edits[:] = [each for each in model.applied_edits if each.placed is not placed]
            raise

    def _own_parts(self) -> frozenset[str]:
        return frozenset(self.parts or [digest(self.changes)])

    @typed
    def revert(self, model: EditableModel, *, force: bool = False) -> None:
        """Take the edit back: the exact bits from before it, with edits applied since then applied again.

        A copy of the edit, loaded from a file, does as well. An interrupt waits until that is done. ValueError where
        the edit is not in force, or something else has changed a weight since; force: undo that too.
        """
        applied = model.applied_edits
        at = next((n for n, each in enumerate(applied) if each.edit is self), None)
        if at is None:
            own = self._own_parts()
            at = next((n for n, each in enumerate(applied) if each.parts == own), None)
        if at is None:
            raise ValueError("this edit is not applied to this model")
        if not force:
            check_untouched(model, [each.placed for each in reversed(applied[at:])])
        later = [each.edit for each in applied[at + 1 :]]
        with uninterrupted():
            for each in reversed(applied[at:]):
                each.placed.take_back()
            del applied[at:]
            for edit in later:
                edit._put(model, edit._weights(model), probe=False)

    def bind(self, model: EditableModel) -> Edit:
        """Note that the edit belongs to `model`, less the edits applied to it. Returns the edit.

        What makes an edit calls this last; it warns of one that changes nothing.
        """
        bind_all([self], model)
        return self

    @typed
    @contextmanager
    def applied(self, model: EditableModel) -> Iterator[EditableModel]:
        """The model with the edit, inside a `with`."""
        with whole_contexts():
            self.apply(model)
            try:
                yield model
            finally:
                self.revert(model)

    @typed
    @torch.no_grad()
    def rounding(self, model: EditableModel) -> dict[str, float]:
        """For each weight |stored change - change| / |change|: what rounding to the weights' dtype takes away."""
        errors = {}
        for name, weight in self._weights(model).items():
            if weight.parameter is not None:
                before, change = weight.parameter.double(), exactly(self.changes[name], weight)
                errors[name] = lost(before, (before + change).to(weight.parameter.dtype), change)
        return errors

    # -- as data ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """One .safetensors file, atomically; everything but tensors is JSON in its metadata."""
        check_changes(self.changes)
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
        tensors |= {f"statistics.{name}": seen for name, seen in self.statistics.items()}
        described = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _AS_TENSORS}
        metadata = {
            "format": "knowedit_ext.edit.1",
            "edit": json.dumps({**described, "changes": kinds}, sort_keys=True),
        }
        write_tensors(path, tensors, metadata)

    @classmethod
    @typed
    def load(cls, path: str | Path) -> Edit:
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != "knowedit_ext.edit.1":
            raise ValueError(f"'{path}' is no saved edit")
        try:
            described = json.loads(metadata["edit"])
            changes: dict[str, Change] = {}
            for name, kind in described.pop("changes").items():
                if kind:
                    changes[name] = LowRank(tensors[f"{name}.inputs"], tensors[f"{name}.outputs"], kind["input_first"])
                else:
                    changes[name] = tensors[f"{name}.dense"]
            keys = {int(n.removeprefix("keys.")): x for n, x in tensors.items() if n.startswith("keys.")}
            seen = {n.removeprefix("statistics."): x for n, x in tensors.items() if n.startswith("statistics.")}
            return cls(changes, **described, keys=keys, statistics=seen)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"'{path}' has a broken description: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{path}' lacks part of the edit or has too much: {error}") from error
        except ValueError as error:
            raise ValueError(f"'{path}' holds no sound edit: {error}") from error

    def to_html(self, path: str | Path, model: EditableModel, prompts: Sequence[str] | None = None) -> None:
        """What the model says without the edit and with it, as a page to click; see `evaluation.before_after`."""
        from ..evaluation.before_after import before_after

        before_after(model, self, prompts).to_html(path)

    @typed
    def to_peft(self, folder: str | Path) -> None:
        """The edit as a LoRA adapter that `peft` loads (same logits); see `editing.peft`."""
        to_peft(self.changes, folder, self.model.get("name"))

    @classmethod
    @typed
    def merge(cls, edits: Sequence[Edit]) -> Edit:
        """The sum of edits of one model. ValueError: of different ones, or an edit that is there twice."""
        if not edits:
            raise ValueError("no edits to merge")
        for edit in edits:
            check_changes(edit.changes)
        parts = [part for edit in edits for part in sorted(edit._own_parts())]
        if len(set(parts)) < len(parts):
            raise ValueError("an edit is twice among those to merge, by itself or as part of a sum")
        names = list(dict.fromkeys(name for edit in edits for name in edit.changes))
        changes: dict[str, Change] = {}
        for name in names:
            terms = [edit.changes[name] for edit in edits if name in edit.changes]
            if len({shape_of(term) for term in terms}) > 1:
                raise ValueError(f"the edits change {quoted(name)} in different shapes: they are of different models")
            if all(isinstance(term, LowRank) for term in terms):
                if len({term.input_first for term in terms}) > 1:
                    raise ValueError(f"the edits take {quoted(name)} in different orders: one the wrong way round")
                inputs, outputs = (torch.cat([getattr(t, k).double() for t in terms], 1) for k in ("inputs", "outputs"))
                changes[name] = LowRank(inputs, outputs, terms[0].input_first)
            else:
                changes[name] = sum(dense(term, torch.float64) for term in terms)
        requests = [request for edit in edits for request in edit.requests]
        method = "+".join(dict.fromkeys(edit.method for edit in edits))
        base, keys = _joint_base(edits), _joint_keys(edits)
        seen = _joint_statistics(edits)
        return cls(changes, method, requests, model=edits[0].model, base=base, keys=keys, statistics=seen, parts=parts)


def _joint_keys(edits: Sequence[Edit]) -> dict[int, torch.Tensor]:
    """Of the layers that all edits keep keys of, side by side."""
    layers = set.intersection(*(set(edit.keys) for edit in edits))
    return {layer: torch.cat([edit.keys[layer] for edit in edits], 1) for layer in sorted(layers)}


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _joint_statistics(edits: Sequence[Edit]) -> dict[str, torch.Tensor]:
    """Of the modules that all edits keep statistics of."""
    names = set.intersection(*(set(edit.statistics) for edit in edits))
    parts = {name: [Running.from_tensor(edit.statistics[name]) for edit in edits] for name in sorted(names)}
    return {name: Running.join(statistics).tensor() for name, statistics in parts.items()}


def _joint_base(edits: Sequence[Edit]) -> Checksums:
    joint: Checksums = {}
    for edit in edits:
        common = joint.keys() & edit.base.keys()
        differences = differing_weights(*({name: base[name] for name in common} for base in (joint, edit.base)))
        if differences:
            raise ValueError(f"the edits were made for different bases: {'; '.join(differences[:3])}")
        joint = edit.base | joint
    return joint


def bind_all(edits: Sequence[Edit], model: EditableModel) -> None:
    """`Edit.bind` of each; a weight that several of them change is read once."""
    base = base_checksums(model, dict.fromkeys(name for edit in edits for name in edit.changes), originals(model))
    for edit in edits:
        if all(map(exactly_zero, edit.changes.values())):
            warnings.warn(
                f"the {edit.method or 'edit'} edit changes nothing: it is exactly zero. There was nothing to learn, or "
                "no step to learn it in",
                stacklevel=3,
            )
        edit.model, edit.base = describe_model(model), {name: base[name] for name in edit.changes}


def originals(model: EditableModel) -> dict[str, torch.Tensor]:
    """The base model's weights by name, where edits applied to it have replaced them."""
    weights: dict[str, torch.Tensor] = {}
    for applied in reversed(model.applied_edits):
        weights |= applied.placed.before
    return weights
