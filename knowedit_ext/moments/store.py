"""`Moments`: second moments of the inputs of down projections, by layer; kept as one safetensors + JSON a layer."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import torch

from ..checks import Count, Natural, as_type, typed
from ..model.identity import config, differing_config, differing_weights, fingerprint
from ..model.load import EditableModel
from ..runs.checksums import json_digest
from ..runs.files import json_bytes, load_json, read_tensors, replacing, save_tensors
from .forward import key_weights, key_width
from .null_space import NullSpace, null_space
from .solver import FactorCache, Solution, solve
from .triangle import pack, symmetric, unpack

FORMAT = 1


@dataclass(frozen=True)
class Moment:
    """E[k k^T] of one layer, uncentred, over `count` keys.

    mean: [d_in, d_in] symmetric, float64 when collected; origin: what it was collected from (model weights, config,
    tokenizer, text, settings), None where that is not known; missing: with `stop="tolerance"`, the estimated relative
    error of solutions from it for want of more text.
    """

    layer: int
    mean: torch.Tensor
    count: int
    origin: Mapping[str, Any] | None = None
    missing: float | None = None

    def matrix(self) -> torch.Tensor:
        """float32 [d_in, d_in], symmetric; a new tensor."""
        return self.mean.to(torch.float32, copy=True)

    @property
    def width(self) -> int:
        return len(self.mean)

    def __repr__(self) -> str:
        return f"Moment(layer {self.layer}, {self.width} x {self.width}, {self.count} keys)"


@dataclass
class Moments:
    """Second moments by layer: `moments[13].matrix()`, `moments[13].count`, `moments.layers`."""

    by_layer: dict[int, Moment]
    factors: FactorCache = field(default_factory=FactorCache, repr=False)
    folder: Path | None = None  # where they were read from: what is derived from them is kept there
    null_spaces: dict[tuple, tuple[Moment, NullSpace]] = field(default_factory=dict, repr=False)
    deflations: OrderedDict[tuple, Any] = field(default_factory=OrderedDict, repr=False)  # see `editing.deflation`

    def __getitem__(self, layer: int) -> Moment:
        if layer not in self.by_layer:
            raise KeyError(
                f"no moments of layer {layer}: there are those of {', '.join(map(str, self.layers)) or 'none'}"
            )
        return self.by_layer[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self.by_layer

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.by_layer)

    @property
    def layers(self) -> list[int]:
        return sorted(self.by_layer)

    @classmethod
    def from_arrays(cls, arrays: Mapping[int, tuple[Any, int]]) -> Moments:
        """From `{layer: (mean matrix E[k k^T] [d_in, d_in], number of keys)}`; tensors or numpy arrays.

        Raises ValueError for what is not square, symmetric (to 1e-4) and finite.
        """
        if not isinstance(arrays, Mapping):
            raise ValueError(f"arrays are {brief(arrays)}: expected {{layer: (mean matrix, number of keys)}}")
        moments = {}
        for given, pair in arrays.items():
            layer = as_type("a layer", given, Natural)
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"moments of layer {layer} are {brief(pair)}: expected (mean matrix, number of keys)")
            moments[layer] = _checked(layer, *pair)
        return cls(moments)

    def solve(
        self,
        layer: int,
        keys: torch.Tensor,
        weight: float,
        ridge: float | str | None = None,
        low_precision: bool = False,
    ) -> Solution:
        """S = (weight * (C + ridge * I) + K K^T)^-1 K for a layer's moment C and keys K [d_in, n], in float64.

        The factor of weight * C is kept for the next call with that layer and weight (`moments.factors.clear()` lets
        go of it). ROME's direction C^-1 k is, up to its length, S for any weight.

        ridge: in units of C; "smallest": the smallest stated one, only where it is needed. None: C as it is.
        low_precision: factor in float32; what that cannot refine to float64 accuracy is solved in float64.

        Raises `NotPositiveDefiniteError`, which names layer, count, smallest pivot and the ridge that would do.
        """
        return solve(self[layer], keys, weight, ridge, low_precision, self.factors)

    def null_space(
        self,
        layer: int,
        threshold: float | None = None,
        share: float | None = None,
        device: torch.device | str = "cpu",
    ) -> NullSpace:
        """The eigenvectors of a layer's moment whose eigenvalues are below `threshold` (AlphaEdit: 2e-2), or as many of
        the smallest as hold at most `share` of the eigenvalues' sum, whatever the scale of the model's keys.

        Computed once, on the device, and kept in the folder that the moments were loaded from. Raises ValueError where
        no direction or every one is in it, with the eigenvalues' range.
        """
        key = (layer, threshold, share, str(device))
        if key not in self.null_spaces or self.null_spaces[key][0] is not self[layer]:
            self.null_spaces[key] = (self[layer], null_space(self[layer], threshold, share, device, self.folder))
        return self.null_spaces[key][1]

    def check(self, model: EditableModel, layer: int, originals: Mapping[str, torch.Tensor] | None = None) -> Moment:
        """The moment of `layer`, once it is sure to belong to `model`; ValueError says what differs.

        originals: by parameter name the weights of the base model that known edits have replaced: the model is then
        recognised as base + edits. Moments of unknown origin (arrays, published files) are only checked for width.
        """
        if not 0 <= layer < model.num_layers:
            raise ValueError(f"layer {layer} is outside the model's 0..{model.num_layers - 1}")
        moment = self[layer]
        width = key_width(model, layer)
        if moment.width != width:
            raise ValueError(
                f"moments of layer {layer} are {moment.width} wide, but the down projection of '{model.name}' takes "
                f"keys of width {width}"
            )
        if moment.origin is not None:
            weights = key_weights(model, [layer], originals)[layer]
            differences = differing_weights(moment.origin["weights"], weights)
            differences += differing_config(moment.origin.get("config", {}), config(model))
            if differences:
                more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
                raise ValueError(
                    f"moments of layer {layer} were collected over another model "
                    f"('{moment.origin['model']}', here '{model.name}'): {'; '.join(differences[:3])}{more}"
                )
        return moment

    @classmethod
    def merge(cls, *parts: Moments) -> Moments:
        """Moments over the texts of all parts together; the same text twice, or another model, is an error."""
        if not parts:
            raise ValueError("there are no moments to merge")
        layers = sorted({layer for part in parts for layer in part.layers})
        return cls({layer: _merged([part[layer] for part in parts if layer in part]) for layer in layers})

    @typed
    def save(self, folder: str | Path) -> None:
        """Write `layer_13.safetensors` (lower triangle of the mean by rows) and `layer_13.json` for each layer."""
        for layer in self.layers:
            save_moment(Path(folder), self[layer])

    @classmethod
    @typed
    def load(cls, folder: str | Path, layers: Sequence[int] | None = None) -> Moments:
        """What `save` or `collect_moments(out=...)` wrote; all layers there, or those asked for."""
        folder = Path(folder)
        there = {int(m[1]): p for p in folder.glob("layer_*.json") if (m := re.fullmatch(r"layer_(\d+)", p.stem))}
        wanted = sorted(there) if layers is None else list(layers)
        if not wanted or not folder.is_dir():
            what = "holds no moments (layer_*.json)" if folder.is_dir() else "is no folder"
            raise ValueError(f"'{folder}' {what}")
        absent = [layer for layer in wanted if layer not in there]
        if absent:
            raise ValueError(f"'{folder}' has no moments of layer {absent[0]}: there are {sorted(there)}")
        return cls({layer: load_moment(folder, layer) for layer in wanted}, folder=folder)


def save_moment(folder: Path, moment: Moment) -> None:
    """Tensor first, sidecar second: a layer whose sidecar is there is whole, and of that tensor."""
    sidecar = {
        "format": FORMAT,
        "layer": moment.layer,
        "count": moment.count,
        "width": moment.width,
        "dtype": str(moment.mean.dtype).removeprefix("torch."),
        "missing": moment.missing,
        "fingerprint": None if moment.origin is None else fingerprint(moment.origin["weights"]),
        "origin": moment.origin,
    }
    tensors = {"mean": pack(moment.mean)}
    path = folder / f"layer_{moment.layer}.json"
    with replacing(path) as beside:
        beside.write_bytes(json_bytes(sidecar))
        with replacing(path.with_suffix(".safetensors")) as file:
            save_tensors(file, tensors, {"moment": _stamp(sidecar)})
            path.unlink(missing_ok=True)  # that of the tensor that is about to be replaced


_STAMPED = ("layer", "count", "fingerprint")


def _stamp(sidecar: Mapping[str, Any]) -> str:
    """What ties a tensor file to its sidecar."""
    return json.dumps({**{key: sidecar[key] for key in _STAMPED}, "sidecar": json_digest(sidecar)})


def _is_stamp(stamp: str, sidecar: Mapping[str, Any]) -> bool:
    """Files of before have none of the whole sidecar."""
    return stamp in (_stamp(sidecar), json.dumps({key: sidecar[key] for key in _STAMPED}))


def load_moment(folder: Path, layer: int) -> Moment:
    """ValueError names the file that is damaged, was altered, or belongs to something else."""
    path = folder / f"layer_{layer}.json"
    sidecar = load_json(path)
    try:
        if sidecar["format"] != FORMAT:
            raise ValueError(f"it is of format {sidecar['format']}: this version reads {FORMAT}")
        width, count, origin = (sidecar[key] for key in ("width", "count", "origin"))
        numbers = [isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (width, count)]
        if not all(numbers) or not isinstance(origin, dict | None):
            raise ValueError(f"width {width!r}, count {count!r}, origin {type(origin).__name__}")
        if origin is not None and fingerprint(origin["weights"]) != sidecar["fingerprint"]:
            raise ValueError("it was changed: its fingerprint is not that of the weights it lists")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{path}' does not describe moments ({type(error).__name__}: {error})") from error
    tensors, metadata = read_tensors(path.with_suffix(".safetensors"))
    if not _is_stamp(metadata.get("moment", ""), sidecar) or sidecar["layer"] != layer:
        raise ValueError(
            f"'{path}' and the .safetensors beside it are not of one collection: {_stamp(sidecar)} and {metadata}"
        )
    try:
        mean = unpack(tensors["mean"], width)
    except (KeyError, ValueError) as error:
        raise ValueError(f"'{path.with_suffix('.safetensors')}' holds no moments: {error}") from error
    return Moment(layer, mean, count, origin, sidecar.get("missing"))


def _checked(layer: int, matrix: Any, count: int) -> Moment:
    try:
        mean = torch.as_tensor(matrix).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"moments of layer {layer} are {brief(matrix)}: expected a matrix of numbers") from error
    if mean.dim() != 2 or mean.shape[0] != mean.shape[1] or not len(mean):
        raise ValueError(f"moments of layer {layer} must be [d_in, d_in], got {list(mean.shape)}")
    if mean.is_complex() or mean.dtype == torch.bool:
        raise ValueError(f"moments of layer {layer} are {mean.dtype}: expected real numbers")
    mean = mean if mean.dtype in (torch.float32, torch.float64) else mean.to(torch.float32)
    if not bool(mean.isfinite().all()):
        raise ValueError(f"moments of layer {layer} are not finite")
    count = as_type(f"the number of keys of layer {layer}", count, Count)
    if float((mean - mean.T).abs().max()) > 1e-4 * float(mean.abs().max()):
        raise ValueError(f"moments of layer {layer} are not symmetric")
    return Moment(layer, symmetric(mean), count)


def _merged(parts: Sequence[Moment]) -> Moment:
    first, total = parts[0], sum(part.count for part in parts)
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        if part.width != first.width:
            raise ValueError(f"moments of layer {first.layer} are {first.width} and {part.width} wide: of two models")
        if (part.origin is None) != (first.origin is None):
            raise ValueError(f"some moments of layer {first.layer} are of unknown origin: they cannot be merged safely")
    origin = None
    if first.origin is not None:
        for part in parts[1:]:
            differences = differing_weights(first.origin["weights"], part.origin["weights"])
            differences += differing_config(first.origin.get("config", {}), part.origin.get("config", {}))
            if differences:
                raise ValueError(f"moments of layer {first.layer} are of two models: {'; '.join(differences[:3])}")
            if part.origin["tokenizer"] != first.origin["tokenizer"]:
                raise ValueError(f"moments of layer {first.layer} were collected with two tokenizers")
        texts = [text for part in parts for text in part.origin["texts"]]
        hashes = [text["sha256"] for text in texts]
        if len(set(hashes)) < len(hashes):
            raise ValueError(f"moments of layer {first.layer}: two parts are over the same text")
        origin = dict(first.origin) | {"texts": texts}
    mean = torch.zeros_like(first.mean, dtype=torch.float64)
    for part in parts:
        mean.add_(part.mean, alpha=part.count / total)
    return replace(first, mean=mean, count=total, origin=origin, missing=None)
