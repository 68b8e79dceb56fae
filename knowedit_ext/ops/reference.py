"""Plain-torch bodies of the ops: oracle, fallback and documentation in one. Same arguments as the ops themselves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of k gathered at a time: on a CPU more would leave the cache and fault in fresh pages.
_GATHER = {"cpu": 1 << 20}
_GATHER_ELSEWHERE = 1 << 24


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype scores and sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ancestors(segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that every segment sees in its ancestors: kv rows, positions, mask, each [n, most]."""
    _, kv_row, position, length, parent = segments.long().unbind(1)
    here, limit = parent, position
    ancestors = [(segments.new_zeros(len(segments), 0, dtype=torch.int64),) * 2 + (here.new_zeros(len(here), 0) > 0,)]
    while bool((here >= 0).any()):
        on, at = here >= 0, here.clamp(min=0)
        start = position[at]
        count = (torch.minimum(start + length[at], limit) - start).clamp(min=0) * on  # [n]
        step = torch.arange(int(count.max()), device=segments.device)
        ancestors.append((kv_row[at, None] + step, start[:, None] + step, step < count[:, None]))
        limit = torch.where(on, torch.minimum(limit, start), limit)
        here = torch.where(on, parent[at], here)
    rows, positions, mask = (torch.cat(part, 1) for part in zip(*ancestors, strict=True))
    return rows, positions, mask


def visible_keys(segments: Tensor, window: int, per_key: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield (query rows [c], key rows [c, m], their positions, mask [c, m]) until every query row had its turn.

    A masked-out entry repeats the row's own key. `per_key` is what one key gathers, in elements.
    """
    query_row, kv_row, position, length, _ = segments.long().unbind(1)
    above_rows, above_positions, above_mask = ancestors(segments)
    number = torch.arange(len(segments), device=segments.device)
    owner = torch.repeat_interleave(number, length * (query_row >= 0))  # [queries] the segment of each
    first = torch.cumsum(length * (query_row >= 0), 0) - length * (query_row >= 0)
    step = torch.arange(len(owner), device=segments.device) - first[owner]
    most = above_rows.shape[1] + (int(step.max()) + 1 if len(step) else 0)
    chunk = max(1, _GATHER.get(segments.device.type, _GATHER_ELSEWHERE) // max(1, most * per_key))
    for seg, i in zip(owner.split(chunk), step.split(chunk), strict=True):
        if not len(seg):
            return
        own = torch.arange(int(i.max()) + 1, device=segments.device).expand(len(seg), -1)
        keys = torch.cat([above_rows[seg], kv_row[seg, None] + own], 1)
        positions = torch.cat([above_positions[seg], position[seg, None] + own], 1)
        mask = torch.cat([above_mask[seg], own <= i[:, None]], 1)
        if window:
            mask &= positions > (position[seg] + i)[:, None] - window
        used = mask.any(0)
        keys, positions, mask = keys[:, used], positions[:, used], mask[:, used]
        keys = torch.where(mask, keys, (kv_row[seg] + i)[:, None])
        yield query_row[seg] + i, keys, torch.where(mask, positions, (position[seg] + i)[:, None]), mask


def _gather(x: Tensor, keys: Tensor, kind: torch.dtype) -> Tensor:
    """Rows `keys` [c, m] of x [kv_rows, kv_heads, d], as [kv_heads, c, m, d] in the compute dtype."""
    return x.transpose(0, 1)[:, keys].to(kind)


def _by_group(x: Tensor, at: Tensor, kv_heads: int, kind: torch.dtype) -> Tensor:
    """Rows `at` [c] of x [rows, heads, d], as [kv_heads, c, group, d] in the compute dtype."""
    return x[at].to(kind).unflatten(1, (kv_heads, -1)).transpose(0, 1)


def _probabilities(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """softmax and d score / d (q.k), both [kv_heads, c, group, m], of grouped q and gathered k.

    sinks: [heads], what takes its share of the softmax and is left out. bias: [heads, positions].
    positions, mask: [c, m].
    """
    scores = q @ k.mT * scale
    slope = torch.full_like(scores, scale)
    if softcap > 0:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, scale * (1 - bent * bent)
    if bias is not None:
        scores = scores + bias[:, positions].unflatten(0, (len(scores), -1)).transpose(1, 2)
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    if sinks is None:
        return torch.softmax(scores, -1), slope
    sink = sinks.to(scores).view(len(scores), 1, -1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1], slope


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
) -> Tensor:
    """Attention of packed rows over their segment tree; see `knowedit_ext.ops.tree_attention`."""
    kv_heads, kind = k.shape[1], compute_dtype(q.dtype)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for at, keys, positions, mask in visible_keys(segments, window, k.shape[1] * k.shape[2]):
        queries, gathered = _by_group(q, at, kv_heads, kind), _gather(k, keys, kind)
        p, _ = _probabilities(queries, gathered, positions, mask, scale, softcap, sinks, bias)
        out[at] = (p @ _gather(v, keys, kind)).transpose(0, 1).flatten(1, 2).to(q.dtype)
    return out


def tree_attention_backward(
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
    """Gradients of `tree_attention` in q, k, v from grad [rows, heads, d]; probabilities are recomputed."""
    kv_heads, kind = k.shape[1], compute_dtype(q.dtype)
    dq = torch.zeros(q.shape, dtype=kind, device=q.device)
    dk, dv = (torch.zeros(x.transpose(0, 1).shape, dtype=kind, device=x.device) for x in (k, v))
    for at, keys, positions, mask in visible_keys(segments, window, k.shape[1] * k.shape[2]):
        queries, up = (_by_group(x, at, kv_heads, kind) for x in (q, grad))
        gathered = _gather(k, keys, kind)
        p, slope = _probabilities(queries, gathered, positions, mask, scale, softcap, sinks, bias)
        dp = up @ _gather(v, keys, kind).mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * slope  # [kv_heads, c, group, m]
        dq[at] = (ds @ gathered).transpose(0, 1).flatten(1, 2)
        dk.index_add_(1, keys.flatten(), (ds.mT @ queries).flatten(1, 2))
        dv.index_add_(1, keys.flatten(), (p.mT @ up).flatten(1, 2))
    dk[:, :frozen] = dv[:, :frozen] = 0
    return dq.to(q.dtype), dk.transpose(0, 1).to(k.dtype).contiguous(), dv.transpose(0, 1).to(v.dtype).contiguous()


def restore_rows(hidden: Tensor, rows: Tensor, source: Tensor, source_rows: Tensor, add: bool = False) -> None:
    """In place: hidden[rows[i]] = (or +=) source[source_rows[i]]; a sum is rounded once."""
    picked = source[source_rows]
    if add:
        picked = hidden[rows] + picked
    hidden[rows] = picked.to(hidden.dtype)


def low_rank_rows(y: Tensor, x: Tensor, left: Tensor, right: Tensor, index: Tensor) -> None:
    """In place: y[r] += left[index[r]] (right[index[r]]^T x[r]), two GEMMs an edit; y is rounded once."""
    kind = compute_dtype(y.dtype)
    order = index.argsort(stable=True)
    present, counts = index[order].unique_consecutive(return_counts=True)
    for edit, at in zip(present.tolist(), order.split(counts.tolist()), strict=True):
        if edit >= 0:
            inner = x[at].to(kind) @ right[edit].to(kind)  # [rows of this edit, rank]
            y[at] = torch.addmm(y[at].to(kind), inner, left[edit].to(kind).T).to(y.dtype)


def target_logprob(
    hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None, targets: Tensor, softcap: float = 0.0
) -> Tensor:
    """log p(target) with the whole [rows, vocab] in memory; see `knowedit_ext.ops.target_logprob`."""
    logits = torch.nn.functional.linear(hidden, head_weight, head_bias).to(compute_dtype(hidden.dtype))
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits, -1)  # [rows, vocab]
    return logp.gather(1, targets if targets.dim() == 2 else targets[:, None]).view(targets.shape)


def null(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
