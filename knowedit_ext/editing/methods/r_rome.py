"""R-ROME: ROME with one key wherever a key stands (Gupta et al. 2024): the mean over contexts or the bare prompt's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...checks import Compat, Seed, typed
from ...model.load import EditableModel
from ...moments import Moments
from ..edit import Edit
from ..method import Method
from ..request import EditRequest, check_requests
from .rome import METHOD as ROME
from .rome import ROMEParams, rome_each, rome_values


@dataclass(frozen=True)
class RROMEParams(ROMEParams):
    """As `ROMEParams`; the presets are those of EasyEdit, hparams/R-ROME.

    enable_prompt_keys: the one key is that of the bare prompt; enable_random_prefix_keys: it is the mean over contexts.
    """

    enable_prompt_keys: bool = False
    enable_random_prefix_keys: bool = True

    algorithms = ("ROME", "R-ROME")
    fixed = {"original_implementation": False}
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        name: ROMEParams.presets[name]
        for name in ("gpt2-xl", "gpt-j", "llama-2-7b", "llama-3-8b", "mistral-7b", "qwen2.5-7b", "world")
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enable_prompt_keys == self.enable_random_prefix_keys:
            raise ValueError("one of enable_prompt_keys and enable_random_prefix_keys must be on, the other off")


@typed
def r_rome(
    model: EditableModel,
    request: EditRequest | Mapping[str, Any] | Iterable[EditRequest | Mapping[str, Any]],
    params: RROMEParams,
    moments: Moments | None = None,
    *,
    contexts: Sequence[str] | None = None,
    compat: Compat = None,
    values: torch.Tensor | None = None,
    earlier: Iterable[Edit] = (),
    ridge: float | str | None = None,
    seed: Seed = 0,
) -> Edit:
    """One fact, one rank-one change. Arguments and errors are those of `rome`; the released code has no quirk that
    compat="reference" would repeat."""
    requests = check_requests(request, problems=True)
    if len(requests) > 1:
        raise ValueError(f"R-ROME edits one fact at a time, not {len(requests)}: use MEMIT")
    options = dict(contexts=contexts, values=values, earlier=earlier, ridge=ridge, seed=seed)
    return r_rome_each(model, requests, params, moments, **options)[0]


@typed
def r_rome_each(
    model: EditableModel,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    params: RROMEParams,
    moments: Moments | None = None,
    *,
    compat: Compat = None,
    **options: Any,
) -> list[Edit]:
    """An edit for each request, see `rome_each`."""
    one_key = "bare" if params.enable_prompt_keys else "mean"
    edits = rome_each(model, requests, params, moments, one_key=one_key, **options)
    for edit in edits:
        edit.method = METHOD.name
    return edits


METHOD = Method(
    "r-rome",
    "R-ROME: ROME with one key throughout",
    r_rome,
    RROMEParams,
    each=r_rome_each,
    contexts=ROME.contexts,
    values=rome_values,
    single=True,
)
