"""Launches of the ops whose native body is for CUDA only; on a CPU torch's own GEMMs do their work."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .launch import _DTYPES, _packed, _stream
from .reference import compute_dtype


def target_logprob(
    native: ModuleType, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float
) -> Tensor:
    """Checked arguments to the kernel; returns log-probabilities shaped like targets."""
    hidden, weight, targets = _packed(hidden), _packed(weight), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    kind = compute_dtype(hidden.dtype)
    out = torch.empty(targets.shape, dtype=kind, device=hidden.device)
    if not out.numel():
        return out
    rows, vocab = len(hidden), len(weight)
    pieces = native.target_logprob_pieces(rows, vocab)
    parts = torch.empty(rows, pieces, 2, dtype=kind, device=hidden.device)  # workspace: a maximum and a sum each
    params = native.TargetLogprob(
        hidden=hidden.data_ptr(),
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        targets=targets.data_ptr(),
        out=out.data_ptr(),
        dtype=_DTYPES[hidden.dtype],
        rows=rows,
        width=hidden.shape[1],
        vocab=vocab,
        count=targets.numel() // rows,
        hidden_stride=hidden.stride(0),
        weight_stride=weight.stride(0),
        softcap=softcap,
    )
    device, stream = _stream(hidden)
    native.target_logprob_cuda(params, parts.data_ptr(), pieces, device, stream)
    return out


def moment_update(
    native: ModuleType, acc: Tensor, x: Tensor, mask: Tensor | None, sum_rows: int, by: str = "mma"
) -> None:
    """Checked arguments to the kernel; writes the lower triangle of acc. x is not float64.

    by: "mma", or "wgmma" or "wgmma_pairs" (and TMA); ValueError where that cannot be.
    """
    target, x = _packed(acc), _packed(x)
    mask = None if mask is None else mask.contiguous()
    params = native.MomentUpdate(
        acc=target.data_ptr(),
        x=x.data_ptr(),
        mask=0 if mask is None else mask.data_ptr(),
        acc_dtype=_DTYPES[acc.dtype],
        x_dtype=_DTYPES[x.dtype],
        rows=x.shape[0],
        width=x.shape[1],
        acc_stride=target.stride(0),
        x_stride=x.stride(0),
        sum_rows=sum_rows,
    )
    device, stream = _stream(x)
    if by == "mma":
        native.moment_update_cuda(params, device, stream)
    elif native.moment_update_has_wgmma(params, device):
        native.moment_update_wgmma_cuda(params, by == "wgmma_pairs", device, stream)
    else:
        raise ValueError(
            f"moment_update: by={by!r} needs a Hopper GPU, a native module with code for sm_90a, and rows of 16-bit "
            f"numbers that begin at multiples of 16 bytes; x is {x.dtype} {list(x.shape)}, strides {list(x.stride())}"
        )
    if target is not acc:
        acc.copy_(target)


def cholesky(native: ModuleType, a: Tensor) -> tuple[Tensor, Tensor]:
    """Factor a [d, d] (float64 or float32, contiguous, its lower triangle read) in place: the factor and LAPACK's info.

    Above the diagonal a stays as it was.
    """
    failure = torch.empty(2, dtype=torch.int64, device=a.device)  # the order of the minor, and the bits of its pivot
    device, stream = _stream(a)
    native.cholesky_cuda(a.data_ptr(), _DTYPES[a.dtype], len(a), a.stride(0), failure.data_ptr(), device, stream)
    return a, failure[0]
