"""From tensors to the native module: allocate, make strides explicit, hand over plain integers."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .reference import compute_dtype

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # knowedit::DType


def _packed(tensor: Tensor) -> Tensor:
    """The tensor itself when its innermost stride is 1, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _stream(tensor: Tensor) -> tuple[int, int]:
    """Device number and raw current stream of a CUDA tensor."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def tree_attention(
    native: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Checked arguments to the native body of q's device; returns [rows, heads, d] contiguous."""
    q, k, v, segments = _packed(q), _packed(k), _packed(v), segments.contiguous()
    sinks, bias = _contiguous(sinks), _contiguous(bias)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    params = _tree_attention_params(native, q, k, v, out, segments, scale, window, softcap, sinks, bias)
    if q.device.type == "cpu":
        native.tree_attention_cpu(params, torch.get_num_threads())
    else:
        owner = torch.empty(len(q), dtype=torch.int32, device=q.device)  # workspace: the segment of each row
        device, stream = _stream(q)
        native.tree_attention_cuda(params, owner.data_ptr(), device, stream)
    return out


def tree_attention_backward(
    native: ModuleType,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    frozen: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in q, k and v from grad [rows, heads, d]; on the CPU half precision is computed in float32."""
    on_cpu, before, compute = q.device.type == "cpu", q.dtype, compute_dtype(q.dtype)
    kind = compute if on_cpu else before
    grad, q, k, v = (_packed(x.to(kind)) for x in (grad, q, k, v))
    segments, sinks, bias = segments.contiguous(), _contiguous(sinks), _contiguous(bias)
    dq, dk, dv = (torch.empty(x.shape, dtype=kind, device=x.device) for x in (q, k, v))
    stats = torch.empty(0 if on_cpu else (*q.shape[:2], 2), dtype=compute, device=q.device)  # workspace
    params = native.TreeAttentionBackward(
        forward=_tree_attention_params(native, q, k, v, dq, segments, scale, window, softcap, sinks, bias),
        grad=grad.data_ptr(),
        dq=dq.data_ptr(),
        dk=dk.data_ptr(),
        dv=dv.data_ptr(),
        stats=stats.data_ptr(),
        kv_rows=len(k),
        grad_strides=grad.stride()[:2],
        frozen=frozen,
    )
    if on_cpu:
        native.tree_attention_backward_cpu(params, torch.get_num_threads())
    else:
        # Workspace: the segment of each row, and of each 8 keys the first and the last line that may see them.
        owner = torch.empty(len(q) + 2 * -(-len(k) // 8), dtype=torch.int32, device=q.device)
        device, stream = _stream(q)
        native.tree_attention_backward_cuda(params, owner.data_ptr(), device, stream)
    return dq.to(before), dk.to(before), dv.to(before)


def _tree_attention_params(
    native: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    segments: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Any:
    return native.TreeAttention(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        segments=segments.data_ptr(),
        dtype=_DTYPES[q.dtype],
        rows=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[2],
        segment_count=segments.shape[0],
        q_strides=q.stride()[:2],
        k_strides=k.stride()[:2],
        v_strides=v.stride()[:2],
        scale=scale,
        window=window,
        softcap=softcap,
        **({} if sinks is None else {"sinks": sinks.data_ptr()}),
        **({} if bias is None else {"bias": bias.data_ptr(), "positions": bias.shape[1]}),
    )


def restore_rows(
    native: ModuleType, hidden: Tensor, rows: Tensor, source: Tensor, source_rows: Tensor, add: bool
) -> None:
    """Checked arguments to the native body of hidden's device; writes hidden in place."""
    target = _packed(hidden)
    same = hidden.data_ptr() == source.data_ptr() and hidden.stride() == source.stride()
    if not same and hidden.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
        source, source_rows = source[source_rows], torch.arange(len(rows), device=rows.device)  # overlapping views
    source, rows, source_rows = _packed(source), rows.contiguous(), source_rows.contiguous()
    params = native.RestoreRows(
        hidden=target.data_ptr(),
        rows=rows.data_ptr(),
        source=source.data_ptr(),
        source_rows=source_rows.data_ptr(),
        hidden_dtype=_DTYPES[hidden.dtype],
        source_dtype=_DTYPES[source.dtype],
        count=rows.shape[0],
        width=hidden.shape[1],
        hidden_stride=target.stride(0),
        source_stride=source.stride(0),
        add=add,
    )
    if hidden.device.type == "cpu":
        native.restore_rows_cpu(params, torch.get_num_threads())
    else:
        device, stream = _stream(hidden)
        native.restore_rows_cuda(params, device, stream)
    if target is not hidden:
        hidden.copy_(target)


def low_rank_rows(native: ModuleType, y: Tensor, x: Tensor, left: Tensor, right: Tensor, index: Tensor) -> None:
    """Checked arguments to the native body of y's device; writes y in place."""
    target, x, index = _packed(y), _packed(x), index.contiguous()
    params = native.LowRankRows(
        y=target.data_ptr(),
        x=x.data_ptr(),
        left=left.data_ptr(),
        right=right.data_ptr(),
        index=index.data_ptr(),
        dtype=_DTYPES[y.dtype],
        factor_dtype=_DTYPES[left.dtype],
        rows=y.shape[0],
        edits=left.shape[0],
        d_out=y.shape[1],
        d_in=x.shape[1],
        rank=left.shape[2],
        y_stride=target.stride(0),
        x_stride=x.stride(0),
        left_strides=left.stride(),
        right_strides=right.stride(),
    )
    if y.device.type == "cpu":
        native.low_rank_rows_cpu(params, torch.get_num_threads())
    else:
        device, stream = _stream(y)
        native.low_rank_rows_cuda(params, device, stream)
    if target is not y:
        y.copy_(target)


def null(native: ModuleType, x: Tensor) -> Tensor:
    """Checked argument to the native body of x's device; returns [rows, d] contiguous."""
    x = _packed(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    params = native.Null(
        x=x.data_ptr(),
        out=out.data_ptr(),
        dtype=_DTYPES[x.dtype],
        rows=len(x),
        width=x.shape[1],
        x_stride=x.stride(0),
    )
    if x.device.type == "cpu":
        native.null_cpu(params, torch.get_num_threads())
    else:
        native.null_cuda(params, *_stream(x))
    return out
