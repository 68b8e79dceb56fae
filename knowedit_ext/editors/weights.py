"""The weights a learned editor changes, in the order that its files have them in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..model.load import EditableModel
from ..model.weights import find_weight

LAST_LAYERS = 3  # mend, config/model: the last three MLPs
DOWN_FIRST = ("gpt2",)  # config/model/gpt2xl.yaml: c_proj before c_fc; gptj.yaml: fc_in before fc_out


@dataclass(frozen=True, eq=False)
class EditedWeight:
    """name: of the parameter; shape: its own; its module reads [d_in] and puts out [d_out]."""

    name: str
    layer: int
    shape: tuple[int, int]
    input_first: bool

    def module_in(self, model: EditableModel) -> nn.Module:
        """Of that very model: an editor serves every model of the kind that it was made for."""
        return find_weight(model.hf, self.name).module

    @property
    def d_in(self) -> int:
        return self.shape[0 if self.input_first else 1]

    @property
    def d_out(self) -> int:
        return self.shape[1 if self.input_first else 0]

    @property
    def key(self) -> str:
        """What the published files call weights of one shape: "(d_in, d_out)"."""
        return f"({self.d_in}, {self.d_out})"


def edited_weights(model: EditableModel, layers: Sequence[int] | None = None) -> list[EditedWeight]:
    """Both projections of the MLPs of some layers; None: the last three. ValueError for layers that are not there."""
    layers = range(max(0, model.num_layers - LAST_LAYERS), model.num_layers) if layers is None else list(layers)
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"the layers to edit are {list(layers)}: expected at least one, and none twice")
    parts = ["up_projection", "down_projection"]
    if model.modules.model_type in DOWN_FIRST:
        parts.reverse()
    weights = []
    for layer in layers:
        if not 0 <= layer < model.num_layers:
            raise ValueError(f"layer {layer} is out of range: the model has layers 0..{model.num_layers - 1}")
        weights += [_weight(model, layer, f"{model.modules.parameter_name(layer, part)}.weight") for part in parts]
    return weights


def named_weights(model: EditableModel, names: Sequence[str]) -> list[EditedWeight]:
    """ValueError, by name, for a weight that is none of the model's MLP projections."""
    known = {weight.name: weight for weight in edited_weights(model, range(model.num_layers))}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"the editor changes '{unknown[0]}', which is no MLP projection of '{model.name}'")
    return [known[name] for name in names]


def _weight(model: EditableModel, layer: int, name: str) -> EditedWeight:
    weight = find_weight(model.hf, name)
    if weight.input_first is None:
        raise ValueError(f"'{name}' is no linear map: learned editors change these alone")
    return EditedWeight(name, layer, weight.shape, weight.input_first)
