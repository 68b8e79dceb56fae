"""The published value caches of MEMIT: one .npz a case with `v_star` (experiments/evaluate.py, memit/memit_main.py)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checks import quoted
from ..model.load import EditableModel
from ..runs.files import atomic_write, file_name, load_npz, model_file_name, save_npz
from .request import EditRequest, check_requests

if TYPE_CHECKING:
    from .methods.memit import MEMITParams

Requests = Iterable[EditRequest | Mapping[str, Any]]
_NAME = re.compile(r".+_layer_(?P<layer>\d+)_clamp_(?P<clamp>\d+(?:\.\d*)?)_case_(?P<case>.+)\.npz")


def value_path(
    kv_dir: str | Path, model_name: str, params: MEMITParams, case_id: int | str, dataset: str = "mcf"
) -> Path:
    """`{kv_dir}/{model}_MEMIT/{dataset}_layer_{last}_clamp_{factor}_case_{id}.npz`, "/" in the model as "_"."""
    dataset, case = file_name(dataset, "dataset"), file_name(case_id, "case_id")
    name = f"{dataset}_layer_{params.layers[-1]}_clamp_{params.clamp_norm_factor:g}_case_{case}.npz"
    return Path(kv_dir) / f"{model_file_name(model_name)}_MEMIT" / name


def export_values(
    values: torch.Tensor,
    requests: Requests,
    params: MEMITParams,
    kv_dir: str | Path,
    model: EditableModel,
    dataset: str = "mcf",
    model_name: str | None = None,
) -> list[Path]:
    """Write values [n, hidden] (z, as `memit_values` gives them) where the published code looks; returns the paths.

    requests: n of them, each with its case_id. dataset: the published name of their data set (mcf, cf, zsre).
    model_name: default the model's own name.
    """
    requests = check_requests(requests)
    if tuple(values.shape) != (len(requests), model.hidden_size):
        raise ValueError(f"values are {list(values.shape)}: expected [{len(requests)} requests, {model.hidden_size}]")
    cases = _cases(requests)
    twice = sorted({case for case in cases if cases.count(case) > 1})
    if twice:
        raise ValueError(f"case {twice[0]} comes twice: a file holds one value")
    name = model_name or model.name
    paths = [value_path(kv_dir, name, params, case, dataset) for case in cases]
    for path, value in zip(paths, values.detach().float().cpu().numpy(), strict=True):
        atomic_write(path, lambda file, value=value: save_npz(file, {"v_star": value}))
    return paths


def import_values(
    files: str | Path | Sequence[str | Path], requests: Requests, params: MEMITParams, model: EditableModel
) -> torch.Tensor:
    """Values [n, hidden] of the requests' cases, in their order, from published files: a folder, one, or several.

    Raises ValueError for a case without a file, of another layer or clamp than `params` say, or of another width.
    """
    requests = check_requests(requests)
    by_case = _by_case(files)
    last, clamp = params.layers[-1], params.clamp_norm_factor
    values = []
    for case in _cases(requests):
        there = by_case.get(case, [])
        fitting = [path for layer, factor, path in there if layer == last and factor == clamp]
        if not fitting:
            others = ", ".join(f"layer {layer} and clamp {factor:g}" for layer, factor, _ in there)
            there_is = f": there is one for {others}" if there else ""
            raise ValueError(f"no value of case {case} for layer {last} and clamp {clamp:g}{there_is}")
        if len(fitting) > 1:
            raise ValueError(
                f"case {case} has several values ('{fitting[0]}', '{fitting[1]}'): name the files of one data set"
            )
        values.append(_read(fitting[0], model.hidden_size))
    return torch.stack(values)


def _cases(requests: Sequence[EditRequest]) -> list[str]:
    for request in requests:
        if request.case_id is None:
            text = request.prompt.replace("{}", request.subject)
            raise ValueError(f"the request {quoted(text)} has no case_id: files of values go by it")
    return [str(request.case_id) for request in requests]


def _by_case(files: str | Path | Sequence[str | Path]) -> dict[str, list[tuple[int, float, Path]]]:
    """case -> (layer, clamp, file), of the files whose names are those of value caches."""
    if isinstance(files, (str, Path)):
        path = Path(files)
        files = sorted(path.glob("*_case_*.npz")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"folder '{path}' has no value file (mcf_layer_17_clamp_0.75_case_0.npz)")
    by_case = defaultdict(list)
    for path in map(Path, files):
        named = _NAME.fullmatch(path.name)
        if named is None:
            raise ValueError(f"'{path}' is not named like a value file: mcf_layer_17_clamp_0.75_case_0.npz")
        by_case[named["case"]].append((int(named["layer"]), float(named["clamp"]), path))
    return by_case


def _read(path: Path, hidden: int) -> torch.Tensor:
    value = load_npz(path, ["v_star"])["v_star"]
    if value.shape != (hidden,) or value.dtype.kind != "f":
        raise ValueError(
            f"'{path}' holds {value.dtype} {list(value.shape)}: expected [{hidden}], a value of this model"
        )
    if not np.isfinite(value).all():
        raise ValueError(f"'{path}' holds NaN or infinite numbers")
    return torch.from_numpy(value).float()
