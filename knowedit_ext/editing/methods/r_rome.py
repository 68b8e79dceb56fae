"""R-ROME: ROME with one key, the mean over the contexts, wherever a key stands (Gupta et al. 2024).

That is how `rome` reads the paper where `compat` is None; here it has its own name, whatever `compat` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...model.load import EditableModel
from ...moments import Moments
from ..edit import Edit
from ..method import Method
from ..request import EditRequest, check_compat
from .rome import METHOD as ROME
from .rome import ROMEParams, rome, rome_each


@dataclass(frozen=True)
class RROMEParams(ROMEParams):
    """As `ROMEParams`; the presets are those of EasyEdit, hparams/R-ROME."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        name: ROMEParams.presets[name]
        for name in ("gpt2-xl", "gpt-j", "llama-2-7b", "llama-3-8b", "mistral-7b", "qwen2.5-7b", "world")
    }


def r_rome(
    model: EditableModel,
    request: EditRequest | Mapping[str, Any],
    params: ROMEParams,
    moments: Moments | None = None,
    *,
    contexts: Sequence[str] | None = None,
    compat: str | None = None,
    ridge: float | str | None = None,
    seed: int = 0,
) -> Edit:
    """One fact, one rank-one change. Arguments and errors are those of `rome`; the released code has no quirk that
    compat="reference" would repeat."""
    check_compat(compat)
    return _named(rome(model, request, params, moments, contexts=contexts, ridge=ridge, seed=seed))


def r_rome_each(
    model: EditableModel,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    params: ROMEParams,
    moments: Moments | None = None,
    *,
    compat: str | None = None,
    **options: Any,
) -> list[Edit]:
    """An edit for each request, see `rome_each`."""
    check_compat(compat)
    return [_named(edit) for edit in rome_each(model, requests, params, moments, **options)]


def _named(edit: Edit) -> Edit:
    edit.method = METHOD.name
    return edit


METHOD = Method(
    "r-rome",
    "R-ROME: ROME with one key throughout",
    r_rome,
    RROMEParams,
    each=r_rome_each,
    contexts=ROME.contexts,
    single=True,
)
