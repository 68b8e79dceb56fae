"""Every op of the package: its schema, its shape rule, and which body answers on which device.

define/impl rather than custom_op: a tenth of the call overhead. CPU and CUDA go to the native module where it is
loaded and to the plain-torch reference otherwise (after a warning); any other device goes to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _native, cholesky, launch, logprob, moment, reference
from .reference import compute_dtype

LIBRARY = torch.library.Library("knowedit_ext", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

LIBRARY.define(
    "tree_attention(Tensor q, Tensor k, Tensor v, Tensor segments, float scale, int window=0, float softcap=0.0,"
    " Tensor? sinks=None, Tensor? bias=None, int frozen=0) -> Tensor",
    tags=_TAGS,
)
LIBRARY.define(
    "tree_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor segments, float scale, int window,"
    " float softcap, Tensor? sinks=None, Tensor? bias=None, int frozen=0) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
LIBRARY.define(
    "restore_rows(Tensor(a!) hidden, Tensor rows, Tensor source, Tensor source_rows, bool add=False) -> ()", tags=_TAGS
)
LIBRARY.define("low_rank_rows(Tensor(a!) y, Tensor x, Tensor left, Tensor right, Tensor index) -> ()", tags=_TAGS)
LIBRARY.define(
    "target_logprob(Tensor hidden, Tensor head_weight, Tensor? head_bias, Tensor targets, float softcap=0.0) -> Tensor",
    tags=_TAGS,
)
LIBRARY.define("moment_update(Tensor(a!) acc, Tensor x, Tensor? mask=None, str by='auto') -> ()", tags=_TAGS)
LIBRARY.define("null(Tensor x) -> Tensor", tags=_TAGS)
LIBRARY.define(
    "cholesky_factor(Tensor moment, float weight, float ridge=0.0, bool low_precision=False, str by='library')"
    " -> (Tensor, Tensor)",
    tags=_TAGS,
)
LIBRARY.define(
    "cholesky_solve_update(Tensor moment, Tensor keys, float weight, float ridge=0.0, Tensor? factor=None,"
    " float norm=0.0, float tolerance=1e-14, int steps=10, str by='library') -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)

# ---- tree_attention ----


def _tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    frozen: int = 0,
) -> Tensor:
    _checks.tree_attention(q, k, v, segments, window, softcap, sinks, bias, frozen)
    device = q.device.type
    native = _native.module(device) if device in ("cpu", "cuda") else None
    if native is None or device == "cpu":  # a CUDA table is checked by the caller: reading it here would wait
        _checks.segment_table(segments, len(q), len(k), None if bias is None else bias.shape[1])
    if native is None:
        return reference.tree_attention(q, k, v, segments, scale, window, softcap, sinks, bias)
    return launch.tree_attention(native, q, k, v, segments, scale, window, softcap, sinks, bias)


def _tree_attention_save(ctx, inputs, output) -> None:
    q, k, v, segments, *ctx.settings, sinks, bias, ctx.frozen = inputs
    ctx.save_for_backward(q, k, v, segments, sinks, bias)


def _tree_attention_backward(ctx, grad: Tensor):
    *saved, sinks, bias = ctx.saved_tensors
    grads = torch.ops.knowedit_ext.tree_attention_backward(grad, *saved, *ctx.settings, sinks, bias, ctx.frozen)
    return (*grads, None, None, None, None, None, None, None)


for key in ("CPU", "CUDA", "CompositeExplicitAutograd"):
    LIBRARY.impl("tree_attention", _tree_attention, key)
torch.library.register_autograd(
    "knowedit_ext::tree_attention", _tree_attention_backward, setup_context=_tree_attention_save, lib=LIBRARY
)


@torch.library.register_fake("knowedit_ext::tree_attention", lib=LIBRARY)
def _(q, k, v, segments, scale, window=0, softcap=0.0, sinks=None, bias=None, frozen=0):
    _checks.tree_attention(q, k, v, segments, window, softcap, sinks, bias, frozen)
    return q.new_empty(q.shape)


def _tree_attention_gradients(
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
    native = _native.module(q.device.type) if q.device.type in ("cpu", "cuda") else None
    if native is None:
        return reference.tree_attention_backward(grad, q, k, v, segments, scale, window, softcap, sinks, bias, frozen)
    return launch.tree_attention_backward(native, grad, q, k, v, segments, scale, window, softcap, sinks, bias, frozen)


LIBRARY.impl("tree_attention_backward", _tree_attention_gradients, "CompositeExplicitAutograd")


@torch.library.register_fake("knowedit_ext::tree_attention_backward", lib=LIBRARY)
def _(grad, q, k, v, segments, scale, window, softcap, sinks=None, bias=None, frozen=0):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


# ---- restore_rows ----


def _restore_rows(hidden: Tensor, rows: Tensor, source: Tensor, source_rows: Tensor, add: bool = False) -> None:
    _checks.restore_rows(hidden, rows, source, source_rows)
    if torch.is_grad_enabled() and (hidden.requires_grad or source.requires_grad):
        raise RuntimeError(
            "restore_rows works in place and has no gradient: call it under torch.no_grad(), or use index_copy"
        )
    device = hidden.device.type
    if device == "cpu":
        _checks.row_indices(hidden, rows, source, source_rows)
    native = _native.module(device) if device in ("cpu", "cuda") else None
    if native is None:
        reference.restore_rows(hidden, rows, source, source_rows, add)
    else:
        launch.restore_rows(native, hidden, rows, source, source_rows, add)
        torch.autograd.graph.increment_version(hidden)


for key in ("CPU", "CUDA", "CompositeExplicitAutograd"):
    LIBRARY.impl("restore_rows", _restore_rows, key)


@torch.library.register_fake("knowedit_ext::restore_rows", lib=LIBRARY)
def _(hidden, rows, source, source_rows, add=False):
    _checks.restore_rows(hidden, rows, source, source_rows)


# ---- low_rank_rows ----


def _low_rank_rows(y: Tensor, x: Tensor, left: Tensor, right: Tensor, index: Tensor) -> None:
    _checks.low_rank_rows(y, x, left, right, index)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (y, x, left, right)):
        raise RuntimeError("low_rank_rows works in place and has no gradient: call it under torch.no_grad()")
    _checks.memory_of_its_own("low_rank_rows", ("y", y), x=x, left=left, right=right, index=index)
    device = y.device.type
    if device == "cpu":
        _checks.edit_indices(index, len(left))
    native = _native.module(device) if device in ("cpu", "cuda") else None
    if native is None:
        reference.low_rank_rows(y, x, left, right, index)
    else:
        launch.low_rank_rows(native, y, x, left, right, index)
        torch.autograd.graph.increment_version(y)


LIBRARY.impl("low_rank_rows", _low_rank_rows, "CompositeExplicitAutograd")


@torch.library.register_fake("knowedit_ext::low_rank_rows", lib=LIBRARY)
def _(y, x, left, right, index):
    _checks.low_rank_rows(y, x, left, right, index)


# ---- target_logprob ----


def _target_logprob(
    hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None, targets: Tensor, softcap: float = 0.0
) -> Tensor:
    _checks.target_logprob(hidden, head_weight, head_bias, targets, softcap)
    if hidden.device.type == "cpu":
        _checks.target_indices(targets, len(head_weight))
    return logprob.forward(hidden, head_weight, head_bias, targets, softcap)


def _target_logprob_save(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, ctx.softcap = inputs
    ctx.save_for_backward(hidden, weight, bias, targets)


def _target_logprob_backward(ctx, grad: Tensor):
    needed = tuple(ctx.needs_input_grad[:3])
    return (*logprob.backward(grad, *ctx.saved_tensors, ctx.softcap, needed), None, None)


LIBRARY.impl("target_logprob", _target_logprob, "CompositeExplicitAutograd")
torch.library.register_autograd(
    "knowedit_ext::target_logprob", _target_logprob_backward, setup_context=_target_logprob_save, lib=LIBRARY
)


@torch.library.register_fake("knowedit_ext::target_logprob", lib=LIBRARY)
def _(hidden, head_weight, head_bias, targets, softcap=0.0):
    _checks.target_logprob(hidden, head_weight, head_bias, targets, softcap)
    return hidden.new_empty(targets.shape, dtype=compute_dtype(hidden.dtype))


# ---- moment_update ----


def _moment_update(acc: Tensor, x: Tensor, mask: Tensor | None = None, by: str = "auto") -> None:
    _checks.moment_update(acc, x, mask, by)
    if torch.is_grad_enabled() and (acc.requires_grad or x.requires_grad):
        raise RuntimeError("moment_update works in place and has no gradient: call it under torch.no_grad()")
    moment.update(acc, x, mask, by)


LIBRARY.impl("moment_update", _moment_update, "CompositeExplicitAutograd")


@torch.library.register_fake("knowedit_ext::moment_update", lib=LIBRARY)
def _(acc, x, mask=None, by="auto"):
    _checks.moment_update(acc, x, mask, by)


# ---- cholesky_factor, cholesky_solve_update ----


def _cholesky_factor(
    moment: Tensor, weight: float, ridge: float = 0.0, low_precision: bool = False, by: str = "library"
):
    _checks.cholesky("cholesky_factor", moment, weight, ridge, by)
    return cholesky.factor(moment, weight, ridge, torch.float32 if low_precision else torch.float64, by)


def _cholesky_solve_update(
    moment: Tensor,
    keys: Tensor,
    weight: float,
    ridge: float = 0.0,
    factor: Tensor | None = None,
    norm: float = 0.0,
    tolerance: float = 1e-14,
    steps: int = 10,
    by: str = "library",
):
    _checks.cholesky("cholesky_solve_update", moment, weight, ridge, by, keys, factor)
    return cholesky.solve(moment, keys, weight, ridge, factor, norm, tolerance, steps, by)


LIBRARY.impl("cholesky_factor", _cholesky_factor, "CompositeExplicitAutograd")
LIBRARY.impl("cholesky_solve_update", _cholesky_solve_update, "CompositeExplicitAutograd")


@torch.library.register_fake("knowedit_ext::cholesky_factor", lib=LIBRARY)
def _(moment, weight, ridge=0.0, low_precision=False, by="library"):
    _checks.cholesky("cholesky_factor", moment, weight, ridge, by)
    kind = torch.float32 if low_precision else torch.float64
    return moment.new_empty(moment.shape, dtype=kind).T, moment.new_empty((), dtype=torch.int64)


@torch.library.register_fake("knowedit_ext::cholesky_solve_update", lib=LIBRARY)
def _(moment, keys, weight, ridge=0.0, factor=None, norm=0.0, tolerance=1e-14, steps=10, by="library"):
    _checks.cholesky("cholesky_solve_update", moment, weight, ridge, by, keys, factor)
    new = keys.new_empty
    return new(keys.shape, dtype=torch.float64), new(3, dtype=torch.float64), new((), dtype=torch.int64)


# ---- null: the op that does nothing, to begin another from ----


def _null(x: Tensor) -> Tensor:
    _checks.null(x)
    device = x.device.type
    native = _native.module(device) if device in ("cpu", "cuda") else None
    return reference.null(x) if native is None else launch.null(native, x)


for key in ("CPU", "CUDA", "CompositeExplicitAutograd"):
    LIBRARY.impl("null", _null, key)
torch.library.register_autograd("knowedit_ext::null", lambda ctx, grad: grad, lib=LIBRARY)


@torch.library.register_fake("knowedit_ext::null", lib=LIBRARY)
def _(x):
    _checks.null(x)
    return x.new_empty(x.shape)
