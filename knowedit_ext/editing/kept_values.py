"""Values of many facts, computed before their edits and found again by what is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..model.load import EditableModel
from .method import Method
from .methods import METHODS
from .params import EditParams, LayerParams
from .request import EditRequest, check_each

Requests = Iterable[EditRequest | Mapping[str, Any]]


@dataclass(frozen=True)
class KeptValues:
    """by_request: [hidden] of each."""

    by_request: Mapping[EditRequest, torch.Tensor]

    @classmethod
    def of(cls, requests: Requests, values: torch.Tensor) -> KeptValues:
        """values: [requests, hidden]."""
        return cls(dict(zip(check_each(requests), values, strict=True)))

    def rows(self, requests: Requests) -> torch.Tensor:
        """[requests, hidden], as a method takes them. KeyError for a request that none were computed for."""
        return torch.stack([self.by_request[request] for request in check_each(requests)])


def keep_values(
    method: Method,
    model: EditableModel,
    requests: Requests,
    params: EditParams,
    store: str | Path,
    *,
    progress: bool = False,
    **options: Any,
) -> KeptValues:
    """All of them, from a folder, and what is not there computed into it: methods whose values are alike share one.

    options: contexts, seed and compat, as the edits will have them. ValueError for a method that has no values, and
    for a folder of others.
    """
    check_keeps(method, params)
    requests = list(dict.fromkeys(check_each(requests)))
    values = method.values(model, requests, params.of_values(), store=store, progress=progress, **options)
    return KeptValues.of(requests, values)


def check_keeps(method: Method, params: LayerParams) -> None:
    if method.values is None:
        keep = ", ".join(name for name, each in METHODS.items() if each.values is not None)
        raise ValueError(f"--store: {method.name} keeps no values; {keep} do")
    if not method.keeps_values(params):
        layers = list(params.layers)
        raise ValueError(
            f"--store: {method.name}'s values of layers {layers} depend on each other; of one they are kept"
        )
