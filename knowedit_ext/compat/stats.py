"""Second moments, read and written where the other libraries look for them (their `layer_stats`).

Missing ones are collected in one pass for all layers that an edit needs, of the model as it is before that edit: the
published loop collects a layer when it comes to it, with the layers below already edited.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import knowedit_ext as ke
from knowedit_ext.moments import Solution, export_npz, import_npz
from knowedit_ext.moments.published import npz_path

from .swap import NotServed, Upstream
from .translate import Library, opened

logger = logging.getLogger(__name__)

# As the data sets are called today; kmeng01's names are gone from the hub.
DATA_SETS = {
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
}
PRECISIONS = ("float32", "float64")


@dataclass(frozen=True)
class Statistics:
    """Files of one model and data set. folder: {stats_dir}/{model}/{data set}_stats; url: where published ones are."""

    stats_dir: Path
    model_folder: str
    dataset: str
    samples: int | None
    precision: str
    url: str | None = None

    def path(self, layer_name: str) -> Path:
        return npz_path(self.stats_dir, self.model_folder, layer_name, self.dataset, self.samples, self.precision)

    def ensure(self, model: ke.EditableModel, layers: Sequence[int]) -> list[Path]:
        """The files of `layers`, once they are there."""
        paths = {layer: self.path(model.modules.parameter_name(layer)) for layer in layers}
        missing = [layer for layer, path in paths.items() if not path.exists() and not self._downloaded(path)]
        if missing:
            logger.info("collecting second moments of layers %s over %s", missing, self.dataset)
            moments = ke.collect_moments(
                model,
                _Texts(_train_split(self.dataset)),
                missing,
                max_texts=self.samples,
                shuffle=None if self.samples is None else 1,  # the published sample
                max_length=longest(model.hf.config),
                products=self.precision,
            )
            options = dict(sample_size=self.samples, model_name=self.model_folder, precision=self.precision)
            export_npz(moments, self.stats_dir, model, self.dataset, **options)
        return list(paths.values())

    def _downloaded(self, path: Path) -> bool:
        if self.url is None:
            return False
        url = f"{self.url}/data/stats/{path.relative_to(self.stats_dir).as_posix()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except Exception as error:
            logger.info("no published statistics at %s (%s)", url, error)
            return False
        return True


def statistics(
    stats_dir: Any, model_folder: str, dataset: str, samples: int | None, precision: str, url: str | None
) -> Statistics:
    """NotServed: a data set or a precision that we do not read."""
    if dataset not in DATA_SETS:
        raise NotServed(f"data set '{dataset}' of second moments is none of {', '.join(DATA_SETS)}")
    if precision not in PRECISIONS:
        raise NotServed(f"second moments in {precision}")
    return Statistics(Path(stats_dir), model_folder, dataset, samples, precision, url)


class Inverted(ke.Moments):
    """Moments that solve as the published ROME does: by their inverse in the precision that they are kept in.

    In float32 that is up to 1e-3 off, and so is the published edit.
    """

    def __init__(self, moments: ke.Moments, precision: str) -> None:
        super().__init__(moments.by_layer)
        self._dtype, self._inverses = getattr(torch, precision), {}

    def solve(self, layer: int, keys: torch.Tensor, *args: Any, **options: Any) -> Solution:
        if layer not in self._inverses:
            self._inverses[layer] = torch.inverse(self[layer].mean.to(self._dtype)).float()
        product = self._inverses[layer].to(keys.device) @ keys.float()
        return Solution(product.double(), float("nan"), 0, "inverse", 0.0)


class _Kept:
    """The moments of the last files read, with what was factored or inverted: many edits solve with the same ones."""

    def __init__(self) -> None:
        self._lock, self._key, self._moments = threading.Lock(), None, None

    def read(self, paths: Sequence[Path], inverted: str | None) -> ke.Moments:
        key = (inverted, [(str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size) for path in paths])
        with self._lock:
            if key != self._key:
                moments = import_npz(paths)
                self._moments, self._key = Inverted(moments, inverted) if inverted else moments, key
            return self._moments


_KEPT = _Kept()


def moments_of(stats: Statistics, model: ke.EditableModel, layers: Sequence[int], inverted: bool = False) -> ke.Moments:
    """inverted: solve as the published ROME."""
    return _KEPT.read(stats.ensure(model, layers), stats.precision if inverted else None)


def longest(config: Any) -> int | None:
    """Tokens of a text, as EasyEdit cuts them (its layer_stats.get_ds)."""
    names = ("n_positions", "max_sequence_length", "max_position_embeddings", "seq_length")
    most = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    kind = getattr(config, "model_type", "")
    if "mistral" in kind:
        return getattr(config, "sliding_window", None) or 4096
    if "qwen" in kind:
        return min(most or 4096, 4096)
    return most


class _Texts(Sequence):
    """Records of a data set, read when they are asked for."""

    def __init__(self, records: Any) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> Any:
        return self._records[number]


def _train_split(name: str) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(f"second moments over '{name}' need the datasets library (pip install datasets)") from error
    return datasets.load_dataset(*DATA_SETS[name])["train"]


def layer_stats(
    model: Any,
    tokenizer: Any,
    layer_name: str,
    stats_dir: Any,
    ds_name: str,
    to_collect: Sequence[str],
    model_name: str | None = None,
    sample_size: int | None = None,
    precision: str | None = None,
    batch_tokens: int | None = None,
    download: bool = True,
    *args: Any,
    library: Library,
    upstream: Upstream,
    force_recompute: bool = False,
    hparams: Any = None,
    **others: Any,
) -> Any:
    """Sees to the file of the layer, and of all layers that hparams name; the library's own function then reads it."""
    if list(to_collect) != ["mom2"] or force_recompute or batch_tokens is not None:
        raise NotServed("statistics other than the whole second moments")
    with opened(model, tokenizer) as editable:
        names = {editable.modules.parameter_name(layer): layer for layer in range(editable.num_layers)}
        if layer_name not in names:
            raise NotServed(f"'{layer_name}' is no down projection")
        known = [layer for layer in getattr(hparams, "layers", ()) if layer in names.values()]
        layers = sorted({names[layer_name], *known})
        folder = model_name or library.model_folder(getattr(model.config, "_name_or_path", ""))
        url = library.stats_url() if download else None
        statistics(stats_dir, folder, ds_name, sample_size, precision or "float64", url).ensure(editable, layers)
    passed = dict(model_name=model_name, sample_size=sample_size, precision=precision, batch_tokens=batch_tokens)
    passed |= dict(download=download, **others) | ({} if hparams is None else {"hparams": hparams})
    return upstream.function(model, tokenizer, layer_name, stats_dir, ds_name, to_collect, **passed)
