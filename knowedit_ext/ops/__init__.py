"""The heavy loops as torch ops (`torch.ops.knowedit_ext.*`), with typed functions in front of them.

Each op has a plain-torch reference (`reference.py`) and native bodies for CPU and CUDA; see `schemas.py` for the list.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, schemas  # noqa: F401  (importing schemas registers the ops)

__all__ = [
    "check_segments",
    "cholesky_factor",
    "cholesky_solve_update",
    "low_rank_rows",
    "moment_update",
    "null",
    "restore_rows",
    "target_logprob",
    "tree_attention",
]


def tree_attention(
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
    """Causal attention of packed rows over the tree of their segments. Differentiable in q, k and v.

    Args:
        q: `[rows, heads, d]`, float32, float64, bfloat16 or float16. Row and head strides are free.
        k, v: `[kv_rows, kv_heads, d]`, dtype of q, `heads % kv_heads == 0`. May hold frozen rows without a query.
        segments: int32 `[n, 5]`, a line each `(query_row, kv_row, position, length, parent)`: keys are rows
            `kv_row .. kv_row+length` at positions `position .. position+length`, queries are rows
            `query_row .. query_row+length` of q (-1: none), parent is another line (-1: a root). Lines come in any
            order; several may view the same key rows, but a query row belongs to one segment.
        scale: factor on q.k.
        window: a row at position p sees position j only when `p - window < j <= p`; 0: no window.
        softcap: scores become `softcap * tanh(scores / softcap)`; 0: none.
        sinks: `[heads]`, float32 (float64 for float64), without a gradient: of each head one more score in every row's
            softmax, which has no value (gpt-oss), so that a row's weights add up to less than 1; None: none.
        bias: `[heads, positions]`, dtype of the sinks, without a gradient: what is added (behind the soft-cap) to each
            head's score of every key at a position. ALiBi is `slope * position`: the distance to the row, but for what
            is the same for all of its keys; None: none.
        frozen: of the first key rows, which get no gradient in k and v: theirs is zero.

    A row at position p sees its own segment up to p, then its parent's positions below the segment's start, and so on
    up; a position is only ever taken from the nearest segment that has it. Softmax is in float32 (float64 for float64).

    Returns:
        `[rows, heads, d]` in q's dtype, contiguous; rows that belong to no segment are zero.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on CPU also a bad table. On CUDA the table is not read back
            (that would wait for the device): check it once with `check_segments`.
    """
    return torch.ops.knowedit_ext.tree_attention(q, k, v, segments, scale, window, softcap, sinks, bias, frozen)


def check_segments(segments: Tensor, rows: int, kv_rows: int, positions: int | None = None) -> None:
    """Raise ValueError naming the line when a segment table `[n, 5]` does not fit `rows` queries, `kv_rows` keys, and
    the `positions` of a bias.

    Out of range rows, unknown parents, cycles and query rows in two segments are found. Copies a CUDA table to the CPU.
    """
    if segments.dim() != 2 or segments.shape[1] != 5:
        raise ValueError(f"segments must be [n, 5], got {list(segments.shape)}")
    _checks.segment_table(segments, rows, kv_rows, positions)


def restore_rows(hidden: Tensor, rows: Tensor, source: Tensor, source_rows: Tensor, add: bool = False) -> None:
    """In place: `hidden[rows[i]] = source[source_rows[i]]`, or `+=` when `add`.

    Args:
        hidden: `[n, d]`, any floating dtype; the row stride is free.
        rows: int64 `[m]`, unique.
        source: `[s, d]` in hidden's dtype, or float32 / float64 (cast; with `add` the sum is rounded once). May be
            `hidden` itself: then no row is both read and written.
        source_rows: int64 `[m]`; may repeat.

    Raises:
        ValueError, IndexError: shapes, dtypes or (on CPU) row numbers do not fit; nothing is written.
        RuntimeError: a gradient is asked for; the op has none.
    """
    torch.ops.knowedit_ext.restore_rows(hidden, rows, source, source_rows, add)


def low_rank_rows(y: Tensor, x: Tensor, left: Tensor, right: Tensor, index: Tensor) -> None:
    """In place: `y[r] += left[index[r]] @ (right[index[r]].T @ x[r])`, many edited models in one batch.

    Args:
        y: `[rows, d_out]`, float32, float64, bfloat16 or float16; its row stride is free.
        x: `[rows, d_in]` in y's dtype; its row stride is free. Shares no memory with y.
        left, right: `[edits, d_out, rank]` and `[edits, d_in, rank]`, both in y's dtype or float32, any strides;
            the transposes of `[edits, rank, d]` need no copy.
        index: int64 `[rows]`, in any order; -1: the row stays as it is.

    Sums are in float32 (float64 for float64), and y is rounded once.

    Raises:
        ValueError: shapes, dtypes, devices or memory do not fit. IndexError (on CPU): an index outside -1..edits-1; on
            CUDA such a row becomes NaN. Nothing is written.
        RuntimeError: a gradient is asked for; the op has none.
    """
    torch.ops.knowedit_ext.low_rank_rows(y, x, left, right, index)


def target_logprob(
    hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None, targets: Tensor, softcap: float = 0.0
) -> Tensor:
    """`log_softmax(softcap(hidden @ head_weight.T + head_bias))[target]` without holding `[rows, vocab]`.

    Args:
        hidden: `[rows, d]`, after the final norm.
        head_weight: `[vocab, d]`; head_bias: `[vocab]` or None, both in hidden's dtype.
        targets: int64 `[rows]` or `[rows, k]` token ids.
        softcap: logits become `softcap * tanh(logits / softcap)`; 0: none.

    Returns:
        log-probabilities (natural), shaped like targets, float32 (float64 for float64). Differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. IndexError (on CPU): a target outside the vocabulary; on CUDA
            such a target gives NaN.
    """
    return torch.ops.knowedit_ext.target_logprob(hidden, head_weight, head_bias, targets, softcap)


def moment_update(acc: Tensor, x: Tensor, mask: Tensor | None = None, by: str = "auto") -> None:
    """In place: the lower triangle of `acc` gains that of `x^T diag(mask) x`; the upper one is left as it is.

    Args:
        acc: `[d, d]`, float32 or float64. With float64 no contribution is lost in a long sum: products are summed in
            float32 over a few thousand rows at most, then added in float64.
        x: `[n, d]`, float32, float64, bfloat16 or float16; the row stride is free. float64 is multiplied as such.
        mask: bool `[n]`; rows where it is False do not count (they may hold anything, NaN too). None: all count.
        by: "library" (GEMMs over the triangle); on CUDA also our kernels "mma", and on Hopper "wgmma" for 16-bit rows
            that TMA reads (each begins at a multiple of 16 bytes), "wgmma_pairs" the same in pairs of blocks that share
            what they read. "auto": what should be the fastest, see docs/gpu.md.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a kernel asked for does not take them; nothing is written.
        RuntimeError: a gradient is asked for; the op has none.
    """
    torch.ops.knowedit_ext.moment_update(acc, x, mask, by)


def null(x: Tensor) -> Tensor:
    """x again, in new memory: the op that does nothing, to begin another from (CONTRIBUTING.md). Differentiable.

    Args:
        x: `[rows, d]`, float32, float64, bfloat16 or float16; the row stride is free.

    Raises:
        ValueError: shape or dtype do not fit.
    """
    return torch.ops.knowedit_ext.null(x)


def cholesky_factor(
    moment: Tensor, weight: float, ridge: float = 0.0, low_precision: bool = False, by: str = "library"
) -> tuple[Tensor, Tensor]:
    """Cholesky factor of `weight * (C + ridge * I)`, to be passed to `cholesky_solve_update` again and again.

    Args:
        moment: C `[d, d]`, symmetric, float32 or float64.
        weight: positive. ridge: >= 0, in units of C.
        low_precision: factor in float32 (half the memory; for matrices of condition far below 1e7).
        by: "library" (LAPACK, cuSOLVER), or on CUDA "kernel", our own factorisation.

    Returns:
        the lower factor `[d, d]`, float64 or float32, and LAPACK's info: 0, or the order of the first leading minor
        that is not positive (then the factor is not one).
    """
    return torch.ops.knowedit_ext.cholesky_factor(moment, weight, ridge, low_precision, by)


def cholesky_solve_update(
    moment: Tensor,
    keys: Tensor,
    weight: float,
    ridge: float = 0.0,
    factor: Tensor | None = None,
    norm: float = 0.0,
    tolerance: float = 1e-14,
    steps: int = 10,
    by: str = "library",
) -> tuple[Tensor, Tensor, Tensor]:
    """S = A^-1 K for A = weight * (C + ridge * I) + K K^T, by Cholesky and refinement with float64 residuals.

    Args:
        moment: C `[d, d]`, symmetric, float32 or float64.
        keys: K `[d, n]`, any floating dtype.
        weight: positive. ridge: >= 0, in units of C.
        factor: what `cholesky_factor` gave for the same C, weight and ridge. With it, and d >= 4 n, the cost is
            O(d^2 n) (Woodbury) and the memory beside C and factor O(d n). Otherwise, and where that does not come to
            the tolerance, the sum is factored, in one more `[d, d]`.
        norm: |C|_2 or a lower bound of it where it is known; 0: estimated (a few passes over C).
        tolerance, steps: refinement ends at this backward error, after that many steps, or when it stagnates.
        by: what factors the sum, see `cholesky_factor`.

    Returns:
        S `[d, n]` float64; float64 `[3]`: backward error reached (the largest |r| / (|A| |s| + |k|) over the columns),
        refinement steps taken, and 1 where the sum was factored; int64 info: 0, or the order of the first leading minor
        of the sum that is not positive (then S is NaN).
    """
    return torch.ops.knowedit_ext.cholesky_solve_update(moment, keys, weight, ridge, factor, norm, tolerance, steps, by)
