"""The directions that keys hardly take: eigenvectors of a layer's second moment with small eigenvalues (AlphaEdit).

They take an eigendecomposition of [d, d] (9 d^3 flops, once), so they are kept beside the moments.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..model.identity import checksum
from ..runs.files import read_tensors, write_tensors

if TYPE_CHECKING:
    from .store import Moment

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NullSpace:
    """rank: dimensions of the null space, of `width`. vectors [width, k], orthonormal: a basis of it (`inside`), or of
    what is left when it is taken away: whichever is smaller. largest: the largest eigenvalue inside."""

    rank: int
    width: int
    vectors: torch.Tensor
    inside: bool
    largest: float

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """P x for x [width, n], float64."""
        vectors = self.vectors.to(x.dtype)
        part = ((x.T @ vectors) @ vectors.T).T  # keys lie in memory by rows
        return part if self.inside else x - part


def null_space(
    moment: Moment,
    threshold: float | None,
    share: float | None,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
) -> NullSpace:
    """See `Moments.null_space`; device: where it is computed and used; folder: where it is kept."""
    if (threshold is None) == (share is None):
        raise ValueError("the null space is told by threshold (of eigenvalues) or by share (of their sum): give one")
    for name, value, most in (("threshold", threshold, math.inf), ("share", share, 1.0)):
        if value is not None and not 0 < value < most:
            raise ValueError(f"{name} is {value}: expected a number above 0" + (f" and below {most:g}" * (most == 1)))
    origin = {"layer": moment.layer, "threshold": threshold, "share": share, "moment": checksum(moment.mean)}
    path = None if folder is None else folder / f"null_space_{moment.layer}_{_name(threshold, share)}.safetensors"
    if path is not None and path.exists():
        tensors, metadata = read_tensors(path)
        kept = json.loads(metadata.get("null_space", "{}"))
        if kept.get("of") == origin:
            return NullSpace(kept["rank"], moment.width, tensors["vectors"].to(device), kept["inside"], kept["largest"])
    space = _decompose(moment, threshold, share, device)
    logger.info("layer %d: the null space has %d of %d dimensions", moment.layer, space.rank, space.width)
    if path is not None:
        state = {"of": origin, "rank": space.rank, "inside": space.inside, "largest": space.largest}
        write_tensors(path, {"vectors": space.vectors.cpu()}, {"null_space": json.dumps(state)})
    return space


def _name(threshold: float | None, share: float | None) -> str:
    return f"threshold_{threshold:g}" if share is None else f"share_{share:g}"


def _decompose(moment: Moment, threshold: float | None, share: float | None, device: torch.device | str) -> NullSpace:
    values, vectors = torch.linalg.eigh(moment.mean.to(device, torch.float64))  # ascending
    if share is None:
        rank = int((values < threshold).sum())
    else:
        rank = int((values.clamp(min=0).cumsum(0) <= share * values.clamp(min=0).sum()).sum())
    if rank in (0, moment.width):
        limit = f"threshold {threshold:g}" if share is None else f"share {share:g}"
        raise ValueError(
            f"layer {moment.layer}: {'no' if not rank else 'every'} direction is in the null space at {limit}; the "
            f"eigenvalues go from {float(values[0]):.3g} to {float(values[-1]):.3g}, their median is "
            f"{float(values.median()):.3g}: choose another threshold, or a share of their sum"
        )
    inside = rank <= moment.width - rank
    kept = vectors[:, :rank] if inside else vectors[:, rank:]
    return NullSpace(rank, moment.width, kept.contiguous(), inside, float(values[rank - 1]))
