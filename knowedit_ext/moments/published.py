"""The published statistics files (rome and memit's `layer_stats`): one .npz a layer, never pickled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..checks import Count, as_type
from ..model.load import EditableModel
from ..runs.files import atomic_write, file_name, load_npz, model_file_name, save_npz
from .store import Moment, Moments

_KEYS = ("mom2.constructor", "mom2.count", "mom2.mom2", "sample_size")
_CONSTRUCTOR = "util.runningstats.SecondMoment()"


def npz_path(
    stats_dir: str | Path,
    model_name: str,
    layer_name: str,
    dataset: str = "wikipedia",
    sample_size: int | None = None,
    precision: str = "float32",
) -> Path:
    """`{stats_dir}/{model}/{dataset}_stats/{layer name}_{precision}_mom2[_{sample size}].npz`; model: "/" as "_"."""
    suffix = "" if sample_size is None else f"_{sample_size}"
    folder = Path(stats_dir) / model_file_name(model_name) / f"{file_name(dataset, 'dataset')}_stats"
    return folder / f"{file_name(layer_name, 'layer_name')}_{precision}_mom2{suffix}.npz"


def export_npz(
    moments: Moments,
    stats_dir: str | Path,
    model: EditableModel,
    dataset: str = "wikipedia",
    sample_size: int | None = None,
    model_name: str | None = None,
    precision: str = "float32",
) -> list[Path]:
    """Write `moments` where the published code looks for them; returns the paths.

    sample_size, precision: what the reader will ask for: texts (`mom2_n_samples`, 100000 in the published settings) and
    `mom2_dtype`, "float32" or "float64". model_name: default the model's own name.
    """
    if precision not in ("float32", "float64"):
        raise ValueError(f"unknown precision '{precision}': expected 'float32' or 'float64'")
    paths = []
    for layer in moments.layers:
        moment = moments.check(model, layer)
        name = model.modules.parameter_name(layer)
        path = npz_path(stats_dir, model_name or model.name, name, dataset, sample_size, precision)
        arrays = {
            "mom2.constructor": np.array(_CONSTRUCTOR),
            "mom2.count": np.array(moment.count),
            "mom2.mom2": (moment.mean.double() * moment.count).to(getattr(torch, precision)).numpy(),
            "sample_size": np.array(np.nan if sample_size is None else sample_size),
        }
        atomic_write(path, lambda file, arrays=arrays: save_npz(file, arrays))
        paths.append(path)
    return paths


def import_npz(files: str | Path | Sequence[str | Path]) -> Moments:
    """Moments from published files: one, several, or a folder of them. The layer is the number in the file's name.

    They do not say which weights they are of, so `Moments.check` can only compare their width.
    """
    if isinstance(files, (str, Path)):
        path = Path(files)
        files = sorted(path.glob("*_mom2*.npz")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"folder '{path}' has no *_mom2*.npz file")
    moments: dict[int, Moment] = {}
    for path in map(Path, files):
        moment = _read(path)
        if moment.layer in moments:
            raise ValueError(f"'{path}': layer {moment.layer} comes twice; name the files of one data set and sample")
        moments[moment.layer] = moment
    return Moments(moments)


def _read(path: Path) -> Moment:
    number = re.search(r"\.(\d+)\.", path.name)
    if number is None:
        raise ValueError(f"'{path}' has no layer number in its name (transformer.h.17.mlp.c_proj_float32_mom2....npz)")
    arrays = load_npz(path, _KEYS[:3])
    if "SecondMoment" not in str(arrays["mom2.constructor"]):
        raise ValueError(f"'{path}' holds {arrays['mom2.constructor']}, not second moments")
    layer = int(number[1])
    try:
        count = as_type("mom2.count", arrays["mom2.count"].tolist(), Count)
        total = torch.from_numpy(arrays["mom2.mom2"]).double()
        return Moments.from_arrays({layer: (total / count, count)})[layer]
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{path}' holds no second moments: {error}") from error
