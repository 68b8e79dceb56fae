"""Argument checks shared by every body of an op. Shapes are always checked, table values where no sync is needed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _same_device(op: str, **tensors: Tensor) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {listed}")


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    window: int,
    softcap: float,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    frozen: int = 0,
) -> None:
    """Shapes, dtypes and devices of `tree_attention`; ValueError in words."""
    op = "tree_attention"
    _require(q.dim() == 3, f"{op}: q must be [rows, heads, d], got {_shape(q)}")
    _require(k.dim() == 3 and k.shape[2] == q.shape[2], f"{op}: k must be [kv_rows, kv_heads, d], got {_shape(k)}")
    _require(v.shape == k.shape, f"{op}: v must have the shape of k, got {_shape(v)} and {_shape(k)}")
    _require(q.shape[2] > 0, f"{op}: the head dimension is 0")
    heads, kv_heads = q.shape[1], k.shape[1]
    _require(kv_heads > 0 and heads % kv_heads == 0, f"{op}: {heads} heads do not divide over {kv_heads} kv heads")
    _require(segments.dim() == 2 and segments.shape[1] == 5, f"{op}: segments must be [n, 5], got {_shape(segments)}")
    _require(segments.dtype == torch.int32, f"{op}: segments must be int32, got {segments.dtype}")
    _require(q.dtype in FLOATS, f"{op}: q must be a floating point tensor, got {q.dtype}")
    _require(q.dtype == k.dtype == v.dtype, f"{op}: q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    _require(window >= 0, f"{op}: window must be >= 0 (0: none), got {window}")
    _require(0 <= frozen <= len(k), f"{op}: frozen must be 0..{len(k)}, rows of k, got {frozen}")
    _require(softcap >= 0, f"{op}: softcap must be >= 0 (0: none), got {softcap}")
    _same_device(op, q=q, k=k, v=v, segments=segments)
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, given, shape in (("sinks", sinks, f"[{heads}]"), ("bias", bias, f"[{heads}, positions]")):
        if given is not None:
            _require(
                given.dim() == 1 + (name == "bias") and len(given) == heads and given.dtype == kind,
                f"{op}: {name} must be {shape} of {kind}, got {_shape(given)} of {given.dtype}",
            )
            _require(not given.requires_grad, f"{op}: {name} gets no gradient; detach it")
            _same_device(op, **{"q": q, name: given})


def segment_table(segments: Tensor, rows: int, kv_rows: int, positions: int | None = None) -> None:
    """Values of a segment table: ranges, parents, no cycle, no query row twice; ValueError names the line.

    positions: how many a bias has.
    """
    table = segments.detach().cpu().numpy().astype(np.int64)
    query, kv, position, length, parent = table.T

    def check(bad: np.ndarray, what: str) -> None:
        if bad.any():
            line = int(bad.argmax())
            raise ValueError(f"segment {line} {table[line].tolist()}: {what}")

    check(length < 0, "negative length")
    check(position < 0, "negative position")
    check((query < -1) | ((query >= 0) & (query + length > rows)), f"query rows outside the {rows} rows of q")
    check((kv < 0) | (kv + length > kv_rows), f"key rows outside the {kv_rows} rows of k and v")
    check((parent < -1) | (parent >= len(table)), f"parent outside the {len(table)} segments")
    if positions is not None:
        check(position + length > positions, f"positions outside the {positions} of the bias")
    asks = query >= 0
    edges = np.bincount(query[asks], minlength=rows + 1) - np.bincount((query + length)[asks], minlength=rows + 1)
    twice = np.flatnonzero(np.cumsum(edges) > 1)
    if len(twice):
        raise ValueError(f"query row {int(twice[0])} belongs to more than one segment")
    # Pointer doubling: after log2(n) steps every walk has left the table, unless it goes round.
    above = np.append(parent, -1)
    for _ in range(max(1, len(table)).bit_length()):
        above = above[above]
    check(above[:-1] >= 0, "its parents form a cycle")


def restore_rows(hidden: Tensor, rows: Tensor, source: Tensor, source_rows: Tensor) -> None:
    """Shapes, dtypes and devices of `restore_rows`; ValueError in words."""
    op = "restore_rows"
    _require(hidden.dim() == 2, f"{op}: hidden must be [n, d], got {_shape(hidden)}")
    _require(
        source.dim() == 2 and source.shape[1] == hidden.shape[1],
        f"{op}: source must be [n, {hidden.shape[1]}], got {_shape(source)}",
    )
    _require(rows.dim() == 1 and rows.dtype == torch.int64, f"{op}: rows must be int64 [m], got {rows.dtype}")
    _require(
        source_rows.shape == rows.shape and source_rows.dtype == torch.int64,
        f"{op}: source_rows must be int64 {_shape(rows)}, got {source_rows.dtype} {_shape(source_rows)}",
    )
    _require(hidden.dtype in FLOATS, f"{op}: hidden must be a floating point tensor, got {hidden.dtype}")
    _require(
        source.dtype in (hidden.dtype, torch.float32, torch.float64),
        f"{op}: source must be {hidden.dtype}, float32 or float64, got {source.dtype}",
    )
    _same_device(op, hidden=hidden, rows=rows, source=source, source_rows=source_rows)


def row_indices(hidden: Tensor, rows: Tensor, source: Tensor, source_rows: Tensor) -> None:
    """Values of the row lists of `restore_rows`: in range, unique, disjoint when both sides are one tensor."""

    def within(index: Tensor, name: str, size: int) -> None:
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= size):
            bad = index[(index < 0) | (index >= size)][0]
            raise IndexError(f"restore_rows: {name} holds {int(bad)}, outside 0..{size - 1}")

    within(rows, "rows", hidden.shape[0])
    within(source_rows, "source_rows", source.shape[0])
    written = torch.zeros(hidden.shape[0], dtype=torch.bool).index_fill_(0, rows, True)
    _require(int(written.sum()) == len(rows), "restore_rows: rows must be unique")
    if hidden.data_ptr() == source.data_ptr() and hidden.stride() == source.stride() and len(rows):
        _require(
            not bool(written[source_rows[source_rows < len(written)]].any()),
            "restore_rows: rows and source_rows must be disjoint when source is hidden itself",
        )


def target_logprob(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float) -> None:
    """Shapes, dtypes and devices of `target_logprob`; ValueError in words."""
    op = "target_logprob"
    _require(hidden.dim() == 2, f"{op}: hidden must be [rows, d], got {_shape(hidden)}")
    _require(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[1] and weight.shape[0] > 0,
        f"{op}: head_weight must be [vocab, {hidden.shape[1]}], got {_shape(weight)}",
    )
    _require(
        bias is None or bias.shape == weight.shape[:1],
        f"{op}: head_bias must be [{weight.shape[0]}], got {_shape(bias) if bias is not None else None}",
    )
    _require(
        targets.dtype == torch.int64 and targets.dim() in (1, 2) and targets.shape[0] == hidden.shape[0],
        f"{op}: targets must be int64 [{hidden.shape[0]}] or [{hidden.shape[0]}, k], got {targets.dtype} "
        f"{_shape(targets)}",
    )
    _require(hidden.dtype in FLOATS, f"{op}: hidden must be a floating point tensor, got {hidden.dtype}")
    _require(weight.dtype == hidden.dtype, f"{op}: hidden is {hidden.dtype} but head_weight is {weight.dtype}")
    _require(bias is None or bias.dtype == hidden.dtype, f"{op}: head_bias must be {hidden.dtype}")
    _require(softcap >= 0, f"{op}: softcap must be >= 0 (0: none), got {softcap}")
    _same_device(
        op, hidden=hidden, head_weight=weight, targets=targets, **({} if bias is None else {"head_bias": bias})
    )


def target_indices(targets: Tensor, vocab: int) -> None:
    """Every target must be a token of the head; IndexError names the first that is not."""
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= vocab):
        bad = targets[(targets < 0) | (targets >= vocab)][0]
        raise IndexError(f"target_logprob: target {int(bad)} is outside the vocabulary of {vocab}")


def _body(op: str, by: str, known: tuple[str, ...], x: Tensor) -> None:
    """A body that there is, on a device that it runs on."""
    _require(by in known, f"{op}: by is {by!r}, expected one of {', '.join(map(repr, known))}")
    own = by not in ("auto", "library")
    _require(not own or x.device.type == "cuda", f"{op}: by={by!r} is a CUDA kernel, the tensors are on {x.device}")


def moment_update(acc: Tensor, x: Tensor, mask: Tensor | None, by: str) -> None:
    """Shapes, dtypes and devices of `moment_update`; ValueError in words."""
    op = "moment_update"
    _require(acc.dim() == 2 and acc.shape[0] == acc.shape[1], f"{op}: acc must be [d, d], got {_shape(acc)}")
    _require(x.dim() == 2 and x.shape[1] == acc.shape[0], f"{op}: x must be [n, {acc.shape[0]}], got {_shape(x)}")
    _require(acc.dtype in (torch.float32, torch.float64), f"{op}: acc must be float32 or float64, got {acc.dtype}")
    _require(x.dtype in FLOATS, f"{op}: x must be a floating point tensor, got {x.dtype}")
    _require(
        mask is None or (mask.shape == x.shape[:1] and mask.dtype == torch.bool),
        f"{op}: mask must be bool [{x.shape[0]}], got {mask.dtype if mask is not None else None} "
        f"{_shape(mask) if mask is not None else None}",
    )
    _same_device(op, acc=acc, x=x, **({} if mask is None else {"mask": mask}))
    _body(op, by, ("auto", "library", "mma", "wgmma", "wgmma_pairs"), x)
    kernel = by in ("mma", "wgmma", "wgmma_pairs")
    _require(not (kernel and x.dtype == torch.float64), f"{op}: by={by!r} does not multiply float64: use 'library'")


def low_rank_rows(y: Tensor, x: Tensor, left: Tensor, right: Tensor, index: Tensor) -> None:
    """Shapes, dtypes and devices of `low_rank_rows`; ValueError in words."""
    op = "low_rank_rows"
    _require(y.dim() == 2, f"{op}: y must be [rows, d_out], got {_shape(y)}")
    rows, d_out = y.shape
    _require(x.dim() == 2 and x.shape[0] == rows, f"{op}: x must be [{rows}, d_in], got {_shape(x)}")
    _require(
        left.dim() == 3 and left.shape[1] == d_out, f"{op}: left must be [edits, {d_out}, rank], got {_shape(left)}"
    )
    expected = [left.shape[0], x.shape[1], left.shape[2]]
    _require(list(right.shape) == expected, f"{op}: right must be {expected}, got {_shape(right)}")
    _require(
        index.shape == (rows,) and index.dtype == torch.int64,
        f"{op}: index must be int64 [{rows}], got {index.dtype} {_shape(index)}",
    )
    _require(y.dtype in FLOATS, f"{op}: y must be a floating point tensor, got {y.dtype}")
    _require(x.dtype == y.dtype, f"{op}: y is {y.dtype} but x is {x.dtype}")
    _require(
        left.dtype == right.dtype and left.dtype in (y.dtype, torch.float32),
        f"{op}: left and right must both be {y.dtype} or both float32, got {left.dtype} and {right.dtype}",
    )
    _same_device(op, y=y, x=x, left=left, right=right, index=index)


def null(x: Tensor) -> None:
    """Shape and dtype of `null`; ValueError in words."""
    _require(x.dim() == 2, f"null: x must be [rows, d], got {_shape(x)}")
    _require(x.dtype in FLOATS, f"null: x must be a floating point tensor, got {x.dtype}")


def memory_of_its_own(op: str, written: tuple[str, Tensor], **others: Tensor) -> None:
    """What is written must not lie in what is read, nor in itself (an expanded tensor); ValueError names both."""
    name, target = written
    repeats = any(stride == 0 and size > 1 for size, stride in zip(target.shape, target.stride(), strict=True))
    _require(not repeats, f"{op}: {name} is expanded, its rows share memory: clone it first")
    begin, end = _span(target)
    for other, tensor in others.items():
        first, after = _span(tensor)
        _require(end <= first or after <= begin, f"{op}: {other} must not share memory with {name}: clone one of them")


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and the one after the last, for non-negative strides."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def edit_indices(index: Tensor, edits: int) -> None:
    """Every row must name an edit, or -1; IndexError names the first that does not."""
    if len(index) and (int(index.min()) < -1 or int(index.max()) >= edits):
        row = int(((index < -1) | (index >= edits)).nonzero()[0])
        raise IndexError(
            f"low_rank_rows: index[{row}] is {int(index[row])}, outside the {edits} edits (-1: a row without one)"
        )


def cholesky(
    op: str,
    moment: Tensor,
    weight: float,
    ridge: float,
    by: str,
    keys: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """Shapes, dtypes, devices and scalars of `cholesky_factor` and `cholesky_solve_update`; ValueError in words."""
    _require(
        moment.dim() == 2 and moment.shape[0] == moment.shape[1], f"{op}: moment must be [d, d], got {_shape(moment)}"
    )
    _require(
        moment.dtype in (torch.float32, torch.float64), f"{op}: moment must be float32 or float64, got {moment.dtype}"
    )
    _require(0 < weight < float("inf"), f"{op}: weight must be positive and finite, got {weight}")
    _require(0 <= ridge < float("inf"), f"{op}: ridge must be >= 0 and finite, got {ridge}")
    _body(op, by, ("library", "kernel"), moment)
    width = moment.shape[0]
    if keys is not None:
        _require(keys.dim() == 2 and keys.shape[0] == width, f"{op}: keys must be [{width}, n], got {_shape(keys)}")
        _require(keys.dtype in FLOATS, f"{op}: keys must be a floating point tensor, got {keys.dtype}")
        _same_device(op, moment=moment, keys=keys)
    if factor is not None:
        _require(factor.shape == moment.shape, f"{op}: factor must be [{width}, {width}], got {_shape(factor)}")
        _require(
            factor.dtype in (torch.float32, torch.float64),
            f"{op}: factor must be float32 or float64, got {factor.dtype}",
        )
        _same_device(op, moment=moment, factor=factor)
