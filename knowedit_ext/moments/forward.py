"""One forward pass that hands over the inputs of several down projections and stops at the last of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..model.hooks import Hooks, Stop, at_rest
from ..model.identity import Checksums, weight_checksums
from ..model.load import EditableModel
from ..sweep.probe import probe


@at_rest
def visit_keys(
    model: EditableModel, ids: torch.Tensor, layers: Sequence[int], visit: Callable[[int, torch.Tensor], None]
) -> None:
    """Run `ids` [texts, tokens] and call visit(layer, keys [texts, tokens, d_in]) for each of `layers`.

    Attention is causal, so texts padded on the right need no mask: a token never sees what is behind it.
    """
    probe(model)
    last = max(layers)

    def look(layer: int) -> Callable:
        def act(args: tuple, kwargs: dict[str, Any]) -> None:
            visit(layer, (args[0] if args else next(iter(kwargs.values()))).view(*ids.shape, -1))
            if layer == last:
                raise Stop

        return act

    with Hooks() as hooks:
        for layer in layers:
            hooks.before(model.modules.down_projection(layer), look(layer))
        model.hf(ids.to(model.device), use_cache=False)


def key_width(model: EditableModel, layer: int) -> int:
    """d_in of a layer's down projection, by the kind of module and never by shape."""
    from transformers.pytorch_utils import Conv1D

    module = model.modules.down_projection(layer)
    return int(module.weight.shape[0]) if isinstance(module, Conv1D) else int(module.in_features)


def key_weights(
    model: EditableModel, layers: Sequence[int], originals: Mapping[str, torch.Tensor] | None = None
) -> dict[int, Checksums]:
    """For each of `layers` the checksums of the weights on which its keys depend.

    These are all below it and its own but for its down projection; later layers, the final norm and the head may
    differ. originals: see `weight_checksums`. ValueError where none are found: moments would fit any model.
    """
    checksums = weight_checksums(model, lambda name: any(_matters(model, name, layer) for layer in layers), originals)
    by_layer = {layer: {n: checksums[n] for n in checksums if _matters(model, n, layer)} for layer in layers}
    for layer, weights in by_layer.items():
        own = f"{model.modules.parameter_name(layer, 'mlp')}."
        if not any(name.startswith(own) for name in weights):
            raise ValueError(f"the model has no weights '{own}...' to tell by which model's moments these are")
    return by_layer


def _matters(model: EditableModel, name: str, layer: int) -> bool:
    family = model.modules.family
    layers = f"{family.base}.{family.layers}."
    if name.startswith(layers):
        number, _, part = name[len(layers) :].partition(".")
        return int(number) < layer or (int(number) == layer and not part.startswith(family.down_projection + "."))
    return name.startswith(family.base + ".") and not name.startswith(f"{family.base}.{family.final_norm}.")
