"""Values in a folder, a file a request: a run that was killed goes on there, the ranks of a `torchrun` share it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..model.identity import identity
from ..model.load import EditableModel
from ..runs.files import load_npz, write_npz
from ..runs.lock import alone
from ..runs.ranks import Ranks
from ..runs.settings import Growth, marked, settle
from .params import EditParams
from .request import EditRequest
from .tokenized import TokenizedRequest
from .values import edits_at_once

_GROWTH = Growth("requests", "number")


def stored_values(
    store: str | Path,
    how: Mapping[str, Any],
    model: EditableModel,
    requests: Sequence[TokenizedRequest],
    params: EditParams,
    layer: int,
    batch: int | None,
    compute: Callable[[range], torch.Tensor],
    progress: bool,
) -> torch.Tensor:
    """[n, hidden] float32, on the CPU, on every rank: read from the folder, and computed where they are not there.

    how: what all values depend on (JSON), besides the model, the requests and what `params` say of values: runs whose
    values are the same share them, whatever else they do with them. They are computed in groups of `batch`, else of as
    many as memory has room for, a share for every rank, or however many a folder was begun with: rounding depends on
    it. compute: (numbers of requests) -> their values.
    Requests may be added at the end; those in a last group that was not full are then computed again. ValueError for a
    folder of other requests or settings.
    """
    store, ranks, count = Path(store), Ranks(), len(requests)
    items = [{"number": n, "request": _marked(request.request)} for n, request in enumerate(requests)]
    asked = {"run": "values", "model": identity(model), "params": params.describe_values(), **how}
    asked |= {"contexts": marked(json.dumps(how["contexts"])), "requests": items}
    most = batch or min(edits_at_once(model, requests, params, layer), math.ceil(count / ranks.size))
    adopted = ("model.name",) if batch else ("model.name", "group")
    with alone(store, ranks):
        settings = settle(
            store,
            {**asked, "group": most},
            ranks,
            adopted=adopted,
            growth=_GROWTH,
            enlarge=lambda earlier: _forget(store, _GROWTH.unfilled(earlier)),
        )
        groups = _GROWTH.groups(count, settings)[ranks.rank :: ranks.size]
        with tqdm(total=sum(map(len, groups)), desc="values", unit="edit", disable=not progress) as bar:
            for group in groups:
                if not all(_path(store, n).exists() for n in group if n < count):
                    _GROWTH.refuse_part(group, count, settings)
                    for n, value in zip(group, compute(group).detach().float().cpu().numpy(), strict=True):
                        write_npz(_path(store, n), {"v_star": value})
                bar.update(len(group))
        ranks.wait()
        values = [_read(_path(store, n), settings["model"]["hidden"]) for n in range(count)]
        ranks.wait()  # before the folder is let go
    return torch.stack(values)


def _marked(request: EditRequest) -> str:
    return marked(json.dumps(request.to_dict(), sort_keys=True))


def _path(store: Path, number: int) -> Path:
    return store / "values" / f"{number:06d}.npz"


def _forget(store: Path, numbers: Iterable[int]) -> None:
    for number in numbers:
        _path(store, number).unlink(missing_ok=True)


def _read(path: Path, hidden: int) -> torch.Tensor:
    value = load_npz(path, ["v_star"], sealed=True)["v_star"]
    if value.shape != (hidden,) or value.dtype != np.float32 or not np.isfinite(value).all():
        raise ValueError(f"'{path}' is no value of this model: expected [{hidden}] finite float32 numbers")
    return torch.from_numpy(value)
