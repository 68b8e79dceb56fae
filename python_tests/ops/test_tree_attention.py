"""`tree_attention`: every body against the float64 oracle."""

from __future__ import annotations

import multiprocessing
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import oracle, trees
from torch import Tensor

from knowedit_ext import ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_qkv(rows: int, kv_rows: int, heads=4, kv_heads=2, d=8, dtype=torch.float64, device="cpu", seed=0):
    torch.manual_seed(seed)
    shapes = ((rows, heads, d), (kv_rows, kv_heads, d), (kv_rows, kv_heads, d))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).to(device) for shape in shapes]


def check(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale=0.3, window=0, softcap=0.0, **more: Tensor
) -> Tensor:
    on = {name: x.to(q.device) for name, x in more.items()}
    out = ops.tree_attention(q, k, v, segments.to(q.device), scale, window, softcap, **on)
    args = (q.cpu(), k.cpu(), v.cpu(), segments, scale, window, softcap)
    assert out.dtype == q.dtype and out.shape == q.shape and out.is_contiguous()
    trees.assert_as_good_as(out, trees.plain(*args, **more), oracle.tree_attention(*args, **more))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 3, 8, 40, 64, 80, 96, 128, 256])
def test_head_dimensions(body, dtype, d):
    segments, rows = trees.forest([9, 4, 1, 6])
    check(*random_qkv(rows, rows, d=d, dtype=dtype, device=body), segments, scale=d**-0.5)


@pytest.mark.parametrize("lengths", [[1], [7], [129], [129, 7, 1], [1, 1, 1, 1], [33, 32, 31]])
def test_awkward_lengths(body, lengths):
    segments, rows = trees.forest(lengths)
    check(*random_qkv(rows, rows, dtype=torch.float32, device=body), segments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 6), (6, 2), (5, 1)])
def test_grouped_heads(body, dtype, heads, kv_heads):
    segments, rows = trees.forest([5, 3, 4])
    check(*random_qkv(rows, rows, heads, kv_heads, dtype=dtype, device=body), segments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 2, 5, 100])
@pytest.mark.parametrize("softcap", [0.0, 0.5, 30.0])
def test_window_and_softcap(body, dtype, window, softcap):
    segments, rows = trees.forest([40, 6, 5])
    check(*random_qkv(rows, rows, dtype=dtype, device=body), segments, 1.0, window, softcap)


def random_sinks(heads: int, dtype: torch.dtype, size: float = 2.0) -> Tensor:
    return size * torch.randn(heads, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("size", [0.0, 2.0, 50.0])
def test_sinks(body, dtype, window, size):
    segments, rows = trees.forest([40, 6, 5])
    qkv = random_qkv(rows, rows, dtype=dtype, device=body)
    out = check(*qkv, segments, 1.0, window, 3.0 * (window == 3), sinks=random_sinks(4, dtype, size))
    assert not torch.equal(out, ops.tree_attention(*qkv, segments.to(body), 1.0, window))


def random_bias(heads: int, segments: Tensor, dtype: torch.dtype, size: float = 2.0) -> Tensor:
    positions = int((segments[:, 2] + segments[:, 3]).max()) if len(segments) else 0
    return size * torch.randn(heads, positions, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("heads, kv_heads, d", [(4, 2, 8), (3, 1, 40), (5, 5, 64)])
def test_bias(body, dtype, window, heads, kv_heads, d):
    segments, rows = trees.forest([40, 6, 5])
    q, k, v = random_qkv(rows, rows, heads, kv_heads, d, dtype, body)
    bias = random_bias(heads, segments, dtype)
    more = {"sinks": random_sinks(heads, dtype)} if window == 3 else {}
    out = check(q, k, v, segments, 0.4, window, 3.0 * (window == 1), bias=bias, **more)
    if window != 1:
        assert not torch.equal(out, ops.tree_attention(q, k, v, segments.to(body), 0.4, window))
    spread = bias[:, None].expand(-1, 3, -1).reshape(3 * heads, -1)[::3]  # its rows do not follow each other
    assert torch.equal(out, check(q, k, v, segments, 0.4, window, 3.0 * (window == 1), bias=spread, **more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_all_keys_of_a_row_are_given_changes_nothing(body, dtype):
    """So ALiBi by a key's position is that by its distance to the row."""
    segments, rows = trees.forest([9, 4, 6])
    q, k, v = random_qkv(rows, rows, dtype=dtype, device=body)
    bias = 0.25 * torch.arange(30, dtype=dtype, device=body).expand(4, -1)
    near, far = (ops.tree_attention(q, k, v, segments.to(body), 0.3, bias=bias - shift) for shift in (0.0, 5.0))
    assert trees.error(near, far.double().cpu()) < 8 * torch.finfo(dtype).eps


@given(seed=st.integers(0, 10**6), window=st.sampled_from([0, 0, 1, 3]), softcap=st.sampled_from([0.0, 2.0]))
@settings(max_examples=150, deadline=None)
def test_any_tree(seed, window, softcap):
    segments, rows, kv_rows = trees.random_tree(seed)
    ops.check_segments(segments, rows, kv_rows)
    more = {"bias": random_bias(4, segments, torch.float32)} if seed % 2 else {}
    check(*random_qkv(rows, kv_rows, dtype=torch.float32, seed=seed), segments, 0.3, window, softcap, **more)


@pytest.mark.parametrize("seed", range(20))
def test_random_trees_on_every_body(body, seed):
    segments, rows, kv_rows = trees.random_tree(seed)
    for dtype in DTYPES:
        qkv = random_qkv(rows, kv_rows, d=20, dtype=dtype, device=body, seed=seed)
        check(*qkv, segments, window=seed % 3)
        check(*qkv, segments, window=seed % 3, bias=random_bias(4, segments, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(body, dtype):
    segments, rows = trees.forest([6, 3, 2])
    torch.manual_seed(0)
    fused = torch.randn(rows + 3, 3 * 4 * 8 + 5, dtype=torch.float64).to(dtype).to(body)[2:, 5:]  # odd offsets
    q, k, v = (part[:rows].unflatten(1, (4, 8)) for part in fused.split(4 * 8, 1))
    check(q, k, v, segments)
    check(q.flip(1), k.transpose(0, 1).contiguous().transpose(0, 1), v, segments)
    check(q.transpose(1, 2).contiguous().transpose(1, 2), k[:, ::2], v[:, ::2], segments)  # innermost stride is not 1
    check(q[:1].expand(rows, -1, -1), k, v, segments)  # row stride 0


def test_rows_of_no_segment_are_zero_and_unseen_rows_do_not_leak(body, uninitialised_is_nan):
    segments = trees.table((2, 1, 0, 3, -1), (7, 5, 2, 2, 0), (-1, 4, 1, 2, 0))
    q, k, v = random_qkv(11, 9, dtype=torch.float32, device=body)
    unseen = [0, 4, 7, 8]
    k[unseen], v[unseen] = float("nan"), float("nan")
    q[[0, 5, 10]] = float("nan")
    out = check_finite(q, k, v, segments)
    assert not out[[0, 1, 5, 6, 9, 10]].any()
    v[6] = float("nan")  # the last row of segment 1: its first row must not see it
    out = ops.tree_attention(q, k, v, segments.to(body), 0.3)
    assert out[7].isfinite().all() and out[8].isnan().all()


def check_finite(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
    out = ops.tree_attention(q, k, v, segments.to(q.device), 0.3)
    truth = oracle.tree_attention(q.nan_to_num(), k.nan_to_num(), v.nan_to_num(), segments, 0.3)
    assert trees.error(out, truth) < 1e-6
    return out


def test_large_scores_do_not_overflow(body):
    segments, rows = trees.forest([5, 4])
    q, k, v = random_qkv(rows, rows, dtype=torch.float32, device=body)
    check(q * 100, k * 100, v, segments, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_segments_and_threads_agree_bit_for_bit(body, dtype):
    lines, row = [(0, 0, 0, 15, -1)], 15
    for i in range(40):
        start = 1 + i % 14
        lines.append((row, row, start, 15 - start, 0))
        row += 15 - start
    lines.append((row, row, 0, 120, -1))
    segments, rows = trees.table(*lines), row + 120
    q, k, v = random_qkv(rows, rows, 4, 4, 64, dtype, body)
    threads = torch.get_num_threads()
    try:
        outs = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            outs.append(ops.tree_attention(q, k, v, segments.to(body), 0.125))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    some = [0, 14, 15, 200, rows - 1, rows - 100]
    truth = dense_rows(q, k, v, segments, some)
    assert trees.error(outs[0][some], truth) < 8 * torch.finfo(dtype).eps


def dense_rows(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, rows: list[int]) -> Tensor:
    """Chosen rows of the oracle: a table of one-row views in front of it."""
    lines = segments.tolist()
    out = []
    for row in rows:
        line = next(i for i, s in enumerate(lines) if 0 <= s[0] <= row < s[0] + s[3])
        seen, _ = oracle.visible(lines, line, lines[line][2] + row - lines[line][0], 0)
        scores = torch.einsum("hd,mhd->hm", q[row].double().cpu(), k[seen].double().cpu()) * 0.125
        out.append(torch.einsum("hm,mhd->hd", torch.softmax(scores, 1), v[seen].double().cpu()))
    return torch.stack(out)


@pytest.mark.parametrize("window, softcap, sunk", [(0, 0.0, False), (2, 0.0, True), (0, 1.5, False), (0, 1.5, True)])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients(body, window, softcap, sunk, biased):
    segments = trees.table((0, 0, 0, 4, -1), (4, 4, 2, 3, 0), (-1, 2, 1, 3, 0), (7, 0, 4, 2, 2))
    leaves = [x.requires_grad_() for x in random_qkv(9, 8, d=3, device=body)]
    table = segments.to(body)
    sinks = random_sinks(4, torch.float64).to(body) if sunk else None
    bias = random_bias(4, segments, torch.float64).to(body) if biased else None
    call = lambda q, k, v: ops.tree_attention(q, k, v, table, 0.4, window, softcap, sinks, bias)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "seed, d, window, softcap", [(0, 64, 0, 0.0), (9, 40, 3, 0.0), (11, 128, 0, 1.5), (17, 7, 2, 0.5)]
)
def test_gradients_of_any_tree_against_autograd_in_float64(body, dtype, seed, d, window, softcap):
    segments, rows, kv_rows = trees.random_tree(seed)
    q, k, v = random_qkv(rows, kv_rows, heads=6, kv_heads=2, d=d, dtype=dtype)
    up = torch.randn(rows, 12, d).to(dtype)[:, ::2]  # its heads do not follow each other
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    sinks = random_sinks(6, dtype) if seed % 2 else None
    bias = random_bias(6, segments, dtype) if seed > 9 else None
    trees.plain(*exact, segments, d**-0.5, window, softcap, sinks, bias).backward(up.double())
    leaves = [x.to(body).requires_grad_() for x in (q, k, v)]
    on = [None if x is None else x.to(body) for x in (sinks, bias)]
    ops.tree_attention(*leaves, segments.to(body), d**-0.5, window, softcap, *on).backward(up.to(body))
    for leaf, truth in zip(leaves, exact, strict=True):
        assert trees.error(leaf.grad.cpu(), truth.grad) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_rows_get_no_gradient(body, dtype):
    segments, rows, kv_rows = trees.random_tree(9)
    up, table = torch.randn(rows, 6, 24).to(body, dtype), segments.to(body)
    found = []
    for frozen in (0, 1, kv_rows // 2, kv_rows):
        qkv = random_qkv(rows, kv_rows, heads=6, kv_heads=2, d=24, dtype=dtype, device=body)
        leaves = [x.requires_grad_() for x in qkv]
        out = ops.tree_attention(*leaves, table, 0.2, frozen=frozen)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, up)))
        (whole_out, whole_q, *whole), (out, dq, *rest) = found[0], found[-1]
        assert torch.equal(out, whole_out) and torch.equal(dq, whole_q)
        for one, every in zip(rest, whole, strict=True):
            assert not one[:frozen].any() and torch.equal(one[frozen:], every[frozen:])


@pytest.mark.parametrize("threads", [2, 5])
def test_gradients_do_not_depend_on_threads(threads):
    segments, rows = trees.forest([90, 40, 40])
    qkv = random_qkv(rows, rows, heads=8, kv_heads=4, d=64, dtype=torch.float32)
    before, gradients = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            leaves = [x.clone().requires_grad_() for x in qkv]
            ops.tree_attention(*leaves, segments, 0.125).square().sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, many) for one, many in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtype_and_shape_of_their_tensors(body, dtype):
    segments, rows = trees.forest([5, 3])
    leaves = [x.requires_grad_() for x in random_qkv(rows, rows, dtype=dtype, device=body)]
    ops.tree_attention(*leaves, segments.to(body), 0.3).sum().backward()
    assert all(x.grad.dtype == dtype and x.grad.shape == x.shape for x in leaves)
    leaves[1].requires_grad_(False)
    ops.tree_attention(*leaves, segments.to(body), 0.3).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(body, dtype):
    segments, rows = trees.forest([5, 3])
    leaves = [x.requires_grad_() for x in random_qkv(rows, rows, dtype=dtype, device=body)]
    for more in ((), (None, random_bias(4, segments, dtype).to(body))):
        args = (*leaves, segments.to(body), 0.3, 2, 1.0, *more)
        torch.library.opcheck(torch.ops.knowedit_ext.tree_attention.default, args)


def test_nothing_to_do(body):
    empty = torch.empty(0, 5, dtype=torch.int32, device=body)
    q, k, v = random_qkv(3, 2, device=body)
    assert not ops.tree_attention(q, k, v, empty, 1.0).any()
    assert ops.tree_attention(q[:0], k, v, trees.table((-1, 0, 0, 2, -1)).to(body), 1.0).shape == (0, 4, 8)


def test_works_in_a_forked_child():
    segments, rows = trees.forest([400, 300])
    args = (*random_qkv(rows, rows, 4, 4, 64), segments, 0.1)
    mine = ops.tree_attention(*args)  # large enough for helper threads, in the parent and in the child

    def in_child() -> None:
        os._exit(0 if np.array_equal(ops.tree_attention(*args).numpy(), mine.numpy()) else 1)

    child = multiprocessing.get_context("fork").Process(target=in_child)
    child.start()
    child.join(60)
    alive = child.is_alive()
    child.kill()
    assert not alive, "the child hangs"
    assert child.exitcode == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.zeros(4, 8)), r"q must be \[rows, heads, d\]"),
        (dict(k=torch.zeros(4, 2, 9)), "k must be"),
        (dict(v=torch.zeros(5, 2, 8)), "v must have the shape of k"),
        (dict(q=torch.zeros(4, 3, 8)), "3 heads do not divide over 2 kv heads"),
        (dict(q=torch.zeros(4, 4, 8, dtype=torch.float64)), "share a dtype"),
        (dict(q=torch.zeros(4, 4, 8, dtype=torch.int32)), "floating point"),
        (dict(segments=torch.zeros(1, 4, dtype=torch.int32)), r"segments must be \[n, 5\]"),
        (dict(segments=torch.zeros(1, 5, dtype=torch.int64)), "segments must be int32"),
        (dict(window=-1), "window must be >= 0"),
        (dict(softcap=-1.0), "softcap must be >= 0"),
        (dict(sinks=torch.zeros(2)), r"sinks must be \[4\] of torch.float32, got \[2\]"),
        (dict(sinks=torch.zeros(4, requires_grad=True)), "sinks gets no gradient"),
        (dict(bias=torch.zeros(4)), r"bias must be \[4, positions\] of torch.float32, got \[4\]"),
        (dict(bias=torch.zeros(2, 4)), r"bias must be \[4, positions\] of torch.float32, got \[2, 4\]"),
        (dict(bias=torch.zeros(4, 4).double()), "of torch.float32, got .* of torch.float64"),
        (dict(bias=torch.zeros(4, 4, requires_grad=True)), "bias gets no gradient"),
        (dict(frozen=5), "frozen must be 0..4, rows of k, got 5"),
        (dict(frozen=-1), "frozen must be 0..4"),
        (dict(bias=torch.zeros(4, 3)), "segment 0 .*positions outside the 3 of the bias"),
    ],
)
def test_bad_arguments(change, message):
    good = dict(q=torch.zeros(4, 4, 8), k=torch.zeros(4, 2, 8), v=torch.zeros(4, 2, 8))
    good |= dict(segments=trees.table((0, 0, 0, 4, -1)), scale=1.0)
    with pytest.raises(ValueError, match=message):
        ops.tree_attention(**(good | change))


@pytest.mark.parametrize(
    "lines, message",
    [
        ([(0, 0, 0, -1, -1)], "segment 0 .*negative length"),
        ([(0, 0, -1, 2, -1)], "negative position"),
        ([(3, 0, 0, 2, -1)], "query rows outside the 4 rows of q"),
        ([(-2, 0, 0, 2, -1)], "query rows outside"),
        ([(0, 0, 0, 2, -1), (-1, 3, 0, 2, -1)], "segment 1 .*key rows outside the 4 rows of k and v"),
        ([(0, -1, 0, 2, -1)], "key rows outside"),
        ([(0, 0, 0, 2, 1)], "parent outside the 1 segments"),
        ([(0, 0, 0, 2, -2)], "parent outside"),
        ([(0, 0, 0, 2, 0)], "cycle"),
        ([(0, 0, 0, 1, 1), (1, 1, 1, 1, 2), (-1, 0, 0, 1, 0)], "segment 0 .*cycle"),
        ([(0, 0, 0, 3, -1), (2, 0, 0, 2, -1)], "query row 2 belongs to more than one segment"),
    ],
)
def test_bad_tables(lines, message):
    segments = trees.table(*lines)
    with pytest.raises(ValueError, match=message):
        ops.check_segments(segments, 4, 4)
    with pytest.raises(ValueError, match=message):
        ops.tree_attention(torch.zeros(4, 4, 8), torch.zeros(4, 2, 8), torch.zeros(4, 2, 8), segments, 1.0)
