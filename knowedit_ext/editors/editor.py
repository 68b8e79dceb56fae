"""What learned editors share: they belong to a model, and are saved under the published names of their tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..model.identity import describe
from ..model.load import EditableModel
from ..model.weights import find_weight
from ..runs.files import read_tensors, write_tensors
from ..sweep.module_rows import Rows
from .weights import EditedWeight, named_weights

FORMAT = "knowedit_ext.editor.1"
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by weight: inputs [rank, d_in], outputs [rank, d_out]


class LearnedEditor:
    """A network that turns the gradient's rows of an edit into a low-rank change of some weights.

    network: its state_dict has the published names; weights: those it changes, in the published order. counting:
    whether training keeps statistics of the gradient's rows.
    """

    name: ClassVar[str]
    counting: ClassVar[bool] = False

    def __init__(self, model: EditableModel, weights: Sequence[EditedWeight], network: nn.Module) -> None:
        self.weights, self.network = list(weights), network.to(model.device).eval()
        self.model = describe(model)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, under their published names."""
        return dict(self.network.state_dict())

    @property
    def layers(self) -> list[int]:
        return sorted({weight.layer for weight in self.weights})

    def check_model(self, model: EditableModel) -> None:
        """ValueError where this is another model's editor, or the model's weights have other shapes."""
        here = describe(model)
        for key in ("type", "layers", "hidden"):
            if here[key] != self.model[key]:
                other = f"{key} {self.model[key]}, here {here[key]}"
                raise ValueError(f"the editor is of another model ('{self.model['name']}'): {other}")
        for weight in self.weights:
            shape = tuple(find_weight(model.hf, weight.name).shape)
            if shape != tuple(weight.shape):
                other = f"'{weight.name}' is {list(weight.shape)}, here {list(shape)}"
                raise ValueError(f"the editor is of another model ('{self.model['name']}'): {other}")

    def factors(self, rows: Rows, ids: Sequence[int]) -> Factors:
        """The change of each weight for gradient rows of a text with these ids; differentiable in the network."""
        return self.factors_each(self.read([rows]), [ids])[0]

    def read(self, rows: Sequence[Rows]) -> list[Any]:
        """What the network takes in of each edit's gradient rows; in training mode they are counted, edit by edit."""
        raise NotImplementedError

    def factors_each(self, read: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[Factors]:
        """Of several edits, each by itself, in one pass through the network."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """One .safetensors file, atomically."""
        inner = json.dumps([weight.name for weight in self.weights])
        about = {"format": FORMAT, "method": self.name, "inner_params": inner, "model": json.dumps(self.model)}
        write_tensors(path, self.tensors, about)

    @classmethod
    def load(cls, path: str | Path, model: EditableModel) -> LearnedEditor:
        """A saved or converted editor. Without metadata its weights are those that its tensors say, or the last ones.

        Raises ValueError for what is no such editor, and for one of another model or shape.
        """
        tensors, about = read_tensors(path)
        try:
            if about.get("method", cls.name) != cls.name:
                raise ValueError(f"it is an editor of {about['method']}, not of {cls.name}")
            if "inner_params" in about:
                weights = named_weights(model, json.loads(about["inner_params"]))
            else:
                weights = cls._weights_in(tensors, model)
            editor = cls(model, weights, cls._network_for(tensors, weights, model))
            _check_shapes(editor.network.state_dict(), tensors)
            editor.network.load_state_dict(tensors)
            made_for = json.loads(about["model"]) if "model" in about else {}
            editor.model |= {key: made_for[key] for key in ("name", "type", "layers", "hidden") if key in made_for}
            editor.check_model(model)
        except (ValueError, KeyError, IndexError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"'{path}' is no {cls.name} editor for '{model.name}': {reason}") from error
        return editor

    @classmethod
    def _weights_in(cls, tensors: Mapping[str, torch.Tensor], model: EditableModel) -> list[EditedWeight]:
        raise NotImplementedError

    @classmethod
    def _network_for(
        cls, tensors: Mapping[str, Any], weights: Sequence[EditedWeight], model: EditableModel
    ) -> nn.Module:
        """A network of the sizes that a file's tensors have."""
        raise NotImplementedError


def _check_shapes(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    if differing := sorted(own.keys() ^ given.keys()):
        which = "lacks" if differing[0] in own else "has an unknown"
        raise ValueError(f"it {which} '{differing[0]}'" + (f" and {len(differing) - 1} more" * (len(differing) > 1)))
    for name, tensor in own.items():
        if tensor.shape != given[name].shape:
            raise ValueError(f"'{name}' is {list(given[name].shape)}, expected {list(tensor.shape)}")
