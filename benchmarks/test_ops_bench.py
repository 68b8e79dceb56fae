"""Times of the ops: the native body beside the plain-torch reference and, for attention, padded SDPA.

Every case is checked before it is timed. Inputs exceed the caches. Reproduce with `make bench`, or
`pytest benchmarks/test_ops_bench.py`; the table's brackets are ratios to the fastest of the group.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from knowedit_ext import ops
from knowedit_ext.ops import _native, launch, reference

HEADS, HEAD_DIM, HIDDEN, VOCAB = 12, 64, 768, 50257


def short_segments() -> Tensor:
    """Tracing's load: 100 prompts of 8 to 20 tokens, 2000 runs that branch from them."""
    rng, lines, row = random.Random(0), [], 0
    roots = [rng.randint(8, 20) for _ in range(100)]
    for length in roots:
        lines.append((row, row, 0, length, -1))
        row += length
    for _ in range(2000):
        root = rng.randrange(100)
        start = rng.randint(1, roots[root] - 1)
        length = min(12, roots[root] - start)
        lines.append((row, row, start, length, root))
        row += length
    return torch.tensor(lines, dtype=torch.int32)


def long_segments() -> Tensor:
    """Two texts of 400 tokens."""
    return torch.tensor([(0, 0, 0, 400, -1), (400, 400, 0, 400, -1)], dtype=torch.int32)


def padded_sdpa(segments: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The usual way: every segment's keys gathered into a padded batch for torch's attention; planned off the clock."""
    table = segments.tolist()
    seen = []
    for _, kv_row, start, length, parent in table:
        above = list(range(table[parent][1], table[parent][1] + start)) if parent >= 0 else []
        seen.append(above + list(range(kv_row, kv_row + length)))
    keys = torch.zeros(len(table), max(map(len, seen)), dtype=torch.int64)  # [n, m]
    queries = torch.zeros(len(table), max(line[3] for line in table), dtype=torch.int64)  # [n, l]
    mask = torch.zeros(len(table), 1, queries.shape[1], keys.shape[1], dtype=torch.bool)
    valid = torch.zeros_like(queries, dtype=torch.bool)
    for i, (query_row, _, _, length, _) in enumerate(table):
        keys[i, : len(seen[i])] = torch.tensor(seen[i])
        queries[i, :length] = torch.arange(query_row, query_row + length)
        valid[i, :length] = True
        above = len(seen[i]) - length
        mask[i, 0, :, : above + 1] = True
        mask[i, 0, :length, :].logical_or_(torch.ones(length, keys.shape[1]).tril(above).bool())
        mask[i, 0, :, len(seen[i]) :] = False

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = torch.nn.functional.scaled_dot_product_attention(
            q[queries].transpose(1, 2), k[keys].transpose(1, 2), v[keys].transpose(1, 2), attn_mask=mask
        )  # [n, heads, l, d]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        out[queries[valid]] = batch.transpose(1, 2)[valid]
        return out

    return run


def native() -> object:
    module, reason = _native.status("cpu")
    if module is None:
        pytest.skip(f"no native module: {reason}")
    return module


@cache
def attention_case(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    segments = {"short": short_segments, "long": long_segments}[name]()
    rows = int(segments[:, 3].sum())
    torch.manual_seed(0)
    fused = torch.randn(rows, 3, HEADS, HEAD_DIM).to(dtype)  # views of one matrix, as GPT-2 gives them
    q, k, v = fused.unbind(1)
    exact = reference.tree_attention(q.double(), k.double(), v.double(), segments, HEAD_DIM**-0.5)
    return q, k, v, segments, exact


@pytest.mark.parametrize("body", ["native", "reference", "padded_sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["short", "long"])
def test_tree_attention(benchmark, case: str, dtype: str, body: str) -> None:
    q, k, v, segments, exact = attention_case(case, getattr(torch, dtype))
    scale = HEAD_DIM**-0.5
    if body == "native":
        native()
        run = partial(ops.tree_attention, q, k, v, segments, scale)
    elif body == "reference":
        run = partial(reference.tree_attention, q, k, v, segments, scale)
    else:
        run = partial(padded_sdpa(segments), q, k, v)
    deviation = float((run().double() - exact).norm() / exact.norm())
    assert deviation < 4 * torch.finfo(q.dtype).eps
    table = segments.tolist()
    pairs = sum(
        length * (start if parent >= 0 else 0) + length * (length + 1) // 2 for _, _, start, length, parent in table
    )
    finish(benchmark, f"tree_attention {case} {dtype}", run, flops=4 * pairs * HEADS * HEAD_DIM)


@pytest.mark.parametrize("body", ["native", "reference"])
def test_tree_attention_backward(benchmark, body: str) -> None:
    """Editing's load: the last 6 rows of 224 prompts of 15 tokens, the rest frozen."""
    prompts, length, last = 224, 15, 6
    frozen, scale = prompts * length, HEAD_DIM**-0.5
    roots = [(-1, i * length, 0, length, -1) for i in range(prompts)]
    ends = [(i * last, frozen + i * last, length - last, last, i) for i in range(prompts)]
    segments = torch.tensor(roots + ends, dtype=torch.int32)
    torch.manual_seed(0)
    q, up = torch.randn(2, prompts * last, HEADS, HEAD_DIM)
    k, v = torch.randn(2, frozen + prompts * last, HEADS, HEAD_DIM)
    run = partial(reference.tree_attention_backward, up, q, k, v, segments, scale, 0, 0.0)
    exact = reference.tree_attention_backward(up.double(), q.double(), k.double(), v.double(), segments, scale, 0, 0.0)
    if body == "native":
        native()
        run = partial(torch.ops.knowedit_ext.tree_attention_backward, *run.args)
    for gradient, truth in zip(run(), exact, strict=True):
        assert float((gradient.double() - truth).norm() / truth.norm()) < 1e-6
    pairs = prompts * (last * (length - last) + last * (last + 1) // 2)
    finish(benchmark, "tree_attention_backward", run, flops=10 * pairs * HEADS * HEAD_DIM)


@pytest.mark.parametrize("body", ["native", "reference"])
@pytest.mark.parametrize("case", ["overwrite", "add"])
def test_restore_rows(benchmark, case: str, body: str) -> None:
    torch.manual_seed(0)
    hidden, source = torch.randn(15000, HIDDEN), torch.randn(15000, HIDDEN)
    rows, source_rows = torch.randperm(15000)[:10000], torch.randint(0, 15000, (10000,))
    add = case == "add"
    mine, plain = hidden.clone(), hidden.clone()
    reference.restore_rows(plain, rows, source, source_rows, add)
    ops.restore_rows(mine, rows, source, source_rows, add)
    assert torch.equal(mine, plain)
    if body == "native":
        module = native()
        run = partial(launch.restore_rows, module, hidden, rows, source, source_rows, add)
    else:
        run = partial(reference.restore_rows, hidden, rows, source, source_rows, add)
    finish(
        benchmark,
        f"restore_rows {case} 10000 x {HIDDEN}",
        run,
        bytes_moved=(3 if add else 2) * rows.numel() * HIDDEN * 4,
    )


def gathered(y: Tensor, x: Tensor, left: Tensor, right: Tensor, index: Tensor) -> None:
    """The usual way: each row's own factors in a batch of small products."""
    of_row = index.clamp(min=0)
    inner = torch.bmm(x[:, None], right[of_row])  # [rows, 1, rank]
    y += torch.bmm(inner, left[of_row].mT)[:, 0] * (index >= 0)[:, None]


@pytest.mark.parametrize("body", ["native", "reference", "gathered"])
@pytest.mark.parametrize("rank", [1, 16])
def test_low_rank_rows(benchmark, rank: int, body: str) -> None:
    """50 edits of GPT-2 small, each with 40 rows, and 200 rows under none."""
    torch.manual_seed(0)
    rows, edits, d_in = 2200, 50, 4 * HIDDEN
    index = (torch.arange(rows) // 40).where(torch.arange(rows) < 2000, -1)
    x, left = torch.randn(rows, d_in), torch.randn(edits, rank, HIDDEN).mT
    right = torch.randn(edits, rank, d_in).mT / d_in**0.5
    y = torch.randn(rows, HIDDEN)
    exact, mine = y.double(), y.clone()
    gathered(exact, x.double(), left.double(), right.double(), index)
    run = {"native": ops.low_rank_rows, "reference": reference.low_rank_rows, "gathered": gathered}[body]
    if body == "native":
        native()
    run(mine, x, left, right, index)
    assert float((mine.double() - exact).norm() / exact.norm()) < 1e-6
    finish(
        benchmark,
        f"low_rank_rows rank {rank}, {rows} x {d_in} -> {HIDDEN}",
        partial(run, y, x, left, right, index),
        flops=2 * 2000 * rank * (d_in + HIDDEN),
        bytes_moved=4 * (2000 * (d_in + 2 * HIDDEN) + edits * rank * (d_in + HIDDEN)),
    )


@pytest.mark.parametrize("body", ["tiled", "reference"])
@pytest.mark.parametrize("rows", [100, 2000])
def test_target_logprob(benchmark, rows: int, body: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, HIDDEN), torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5
    targets = torch.randint(0, VOCAB, (rows,))
    run = partial(ops.target_logprob if body == "tiled" else reference.target_logprob, hidden, weight, None, targets)
    few = slice(0, 20)
    exact = reference.target_logprob(hidden[few].double(), weight.double(), None, targets[few])
    assert float((run()[few].double() - exact).norm() / exact.norm()) < 1e-6
    finish(benchmark, f"target_logprob {rows} x {VOCAB}", run, flops=2 * rows * VOCAB * HIDDEN)


def finish(benchmark, group: str, run: Callable[[], object], flops: int = 0, bytes_moved: int = 0) -> None:
    """Median of a few rounds; rates go to the JSON."""
    benchmark.group = group
    benchmark.pedantic(run, rounds=5)  # the check was the warm-up
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        if flops:
            benchmark.extra_info["gflops"] = round(flops / seconds / 1e9, 1)
        if bytes_moved:
            benchmark.extra_info["gbytes_per_second"] = round(bytes_moved / seconds / 1e9, 1)
        print(f"\n{group}: {seconds * 1e6:.0f} us {benchmark.extra_info}")
