"""Files of values (MEMIT) and of vectors (ROME), as memit's scripts keep them with use_cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import knowedit_ext as ke
from knowedit_ext.editing.edit import LowRank, weight_is_input_first
from knowedit_ext.runs.files import load_npz, write_npz

from .swap import NotServed


def _file(template: str, layer: int, clamp: float, raw: Mapping[str, Any]) -> Path:
    return Path(str(template).format(layer, clamp, raw["case_id"]))


def cached_values(
    raws: Sequence[Mapping[str, Any]],
    optimised: Callable[[Sequence[Mapping[str, Any]]], torch.Tensor],
    template: str,
    layer: int,
    clamp: float,
) -> torch.Tensor:
    """Values [n, hidden]; those without a file are computed together and written."""
    files = [_file(template, layer, clamp, raw) for raw in raws]
    absent = [n for n, file in enumerate(files) if not file.exists()]
    fresh = dict(zip(absent, optimised([raws[n] for n in absent]), strict=True)) if absent else {}
    for n, value in fresh.items():
        _write(files[n], v_star=value)
    return torch.stack([fresh[n] if n in fresh else _read_value(file) for n, file in enumerate(files)])


def _read_value(file: Path) -> torch.Tensor:
    return torch.from_numpy(load_npz(file, ("v_star",))["v_star"])


def rome_cache(template: str | None, raw: Mapping[str, Any], layers: Sequence[int], hparams: Any) -> Path | None:
    if template is None:
        return None
    if len(layers) > 1:
        raise NotServed("a cache of ROME's vectors for more than one layer")
    return _file(template, layers[0], hparams.clamp_norm_factor, raw)


def read_vectors(model: ke.EditableModel, file: Path, layers: Sequence[int]) -> ke.Edit:
    arrays = load_npz(file, ("left_vector", "right_vector"))
    u, v = (torch.from_numpy(arrays[name])[:, None] for name in ("left_vector", "right_vector"))
    input_first = weight_is_input_first(model.modules.down_projection(layers[0]))
    return ke.Edit({f"{model.modules.parameter_name(layers[0])}.weight": LowRank(u, v, input_first)}, "rome")


def write_vectors(file: Path, edit: ke.Edit) -> None:
    (change,) = edit.changes.values()
    _write(file, left_vector=change.inputs[:, 0], right_vector=change.outputs[:, 0])


def _write(file: Path, **arrays: torch.Tensor) -> None:
    write_npz(file, {name: array.detach().float().cpu().numpy() for name, array in arrays.items()})
