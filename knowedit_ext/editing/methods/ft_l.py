"""FT+L: fine-tuning in which no entry of a weight moves farther than `norm_constraint` (rome, hparams/FT)."""

from __future__ import annotations

from ..method import Method
from .finetune import FTParams, finetune, finetune_each


def _bounded(params: FTParams) -> None:
    if params.norm_constraint is None:
        raise ValueError("there is no norm_constraint, which ft-l is fine-tuning with: that is method ft")


METHOD = Method(
    "ft-l", "fine-tuning within a bound on each entry", finetune, FTParams, check=_bounded, each=finetune_each
)
