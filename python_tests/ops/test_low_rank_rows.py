"""`low_rank_rows`: every body against the sum in float64, a row at a time."""

from __future__ import annotations

import pytest
import torch

from knowedit_ext import ops
from knowedit_ext.ops import _native

DTYPES = [("float32", "float32"), ("float64", "float64"), ("float64", "float32")] + [
    (half, factor) for half in ("bfloat16", "float16") for factor in (half, "float32")
]
INDEX = [2, 2, 2, 2, 2, -1, 0, 0, 1, -1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]  # runs, lone rows, edit 3 nowhere


def expected(y, x, left, right, index) -> torch.Tensor:
    """In float64, rounded once."""
    out = y.double().clone()
    for row, edit in enumerate(index.tolist()):
        if edit >= 0:
            out[row] += left[edit].double() @ (right[edit].double().T @ x[row].double())
    return out


def case(body: str, dtype: str, factor_dtype: str, d_in: int, d_out: int, rank: int):
    torch.manual_seed(d_in + d_out + rank)
    kind, factor = getattr(torch, dtype), getattr(torch, factor_dtype)
    y, x = torch.randn(len(INDEX), d_out), torch.randn(len(INDEX), d_in)
    left, right = torch.randn(4, d_out, rank), torch.randn(4, d_in, rank) / d_in**0.5
    index = torch.tensor(INDEX, device=body)
    return y.to(body, kind), x.to(body, kind), left.to(body, factor), right.to(body, factor), index


def assert_close(ours: torch.Tensor, exact: torch.Tensor, sums: torch.dtype = torch.float32) -> None:
    """One rounding to the dtype of y, after sums in `sums`."""
    eps = torch.finfo(ours.dtype).eps / 2 + 8 * torch.finfo(sums).eps
    scale = exact.abs() + exact.abs().amax(1, keepdim=True)
    assert ((ours.double() - exact).abs() <= eps * scale).all()


@pytest.mark.parametrize("d_in, d_out", [(1, 1), (7, 5), (64, 16), (129, 151), (33, 200)])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7, 33])
@pytest.mark.parametrize("dtype, factor_dtype", DTYPES)
def test_matches_the_sum_in_float64(body, dtype, factor_dtype, rank, d_in, d_out):
    y, x, left, right, index = case(body, dtype, factor_dtype, d_in, d_out, rank)
    exact, before = expected(y, x, left, right, index), y.clone()
    assert ops.low_rank_rows(y, x, left, right, index) is None
    assert_close(y, exact, torch.float64 if dtype == "float64" else torch.float32)
    assert torch.equal(y[index < 0], before[index < 0])


@pytest.mark.parametrize("dtype, factor_dtype", DTYPES)
def test_views_with_strides_of_their_own(body, dtype, factor_dtype):
    y, x, left, right, index = case(body, dtype, factor_dtype, 35, 50, 3)
    exact = expected(y, x, left, right, index)
    buffer = torch.full((len(y) + 2, 60), float("nan"), dtype=y.dtype, device=body)
    inside = buffer[1:-1, 4:54]
    inside.copy_(y)
    wide = torch.cat([x, x], 1)[:, 35:]
    every_other = torch.stack([index, index], 1)[:, 0]
    by_component = left.mT.contiguous().mT, right.mT.contiguous().mT
    ops.low_rank_rows(inside, wide, *by_component, every_other)
    assert_close(inside, exact, torch.float64 if dtype == "float64" else torch.float32)
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[1:-1, 4:54] = False
    assert buffer[outside].isnan().all()


def test_one_factor_for_all_and_innermost_strides_other_than_one(body):
    y, x, left, right, index = case(body, "float32", "float32", 6, 5, 2)
    y, x, left = y.T.contiguous().T, x.T.contiguous().T, left[:1].expand(4, -1, -1)
    exact = expected(y, x, left, right, index)
    ops.low_rank_rows(y, x, left, right, index)
    assert_close(y, exact)


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_and_threaded(body, dtype, rank):
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    y, x = torch.randn(3000, 96, device=body).to(kind), torch.randn(3000, 384, device=body).to(kind)
    left, right = torch.randn(40, 96, rank, device=body), torch.randn(40, 384, rank, device=body) / 20
    index = torch.randint(-1, 40, (3000,), device=body)
    index[:2000] = index[:2000].sort().values
    of_each = index.clamp(min=0)
    inner = torch.einsum("ri,rik->rk", x.double(), right.double()[of_each])
    update = torch.einsum("rk,rok->ro", inner, left.double()[of_each])
    exact = y.double() + update * (index >= 0)[:, None]
    ops.low_rank_rows(y, x, left, right, index)
    assert_close(y, exact)


def test_a_row_does_not_depend_on_the_others(body):
    if body == "cuda" or _native.module("cpu") is None:
        pytest.skip("promised of the native CPU bodies")
    y, x, left, right, index = case(body, "float32", "float32", 77, 45, 3)
    alone = y.clone()
    for row in range(len(y)):
        ops.low_rank_rows(alone[row : row + 1], x[row : row + 1], left, right, index[row : row + 1])
    ops.low_rank_rows(y, x, left, right, index)
    assert torch.equal(alone, y)


@pytest.mark.parametrize("rows, edits, rank", [(0, 3, 2), (4, 3, 0), (4, 0, 2)])
def test_nothing_to_add(body, rows, edits, rank):
    y, x = torch.ones(rows, 5, device=body), torch.ones(rows, 6, device=body)
    left, right = torch.ones(edits, 5, rank, device=body), torch.ones(edits, 6, rank, device=body)
    index = torch.full((rows,), 0 if rank == 0 else -1, device=body)
    ops.low_rank_rows(y, x, left, right, index)
    assert (y == 1).all()


def test_opcheck_and_version_counter(body):
    arguments = case(body, "float32", "float32", 9, 8, 2)
    torch.library.opcheck(torch.ops.knowedit_ext.low_rank_rows.default, arguments)
    version = arguments[0]._version
    ops.low_rank_rows(*arguments)
    assert arguments[0]._version > version
    with torch.inference_mode():
        ops.low_rank_rows(*(x.clone() for x in arguments))


@pytest.mark.parametrize("bad", [4, -2])
def test_an_index_outside_the_edits_writes_nothing(bad):
    y, x, left, right, index = case("cpu", "float32", "float32", 6, 5, 2)
    index[3], before = bad, y.clone()
    with pytest.raises(IndexError, match=rf"index\[3\] is {bad}, outside the 4 edits"):
        ops.low_rank_rows(y, x, left, right, index)
    assert torch.equal(y, before)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(y=torch.zeros(5)), r"y must be \[rows, d_out\], got \[5\]"),
        (dict(x=torch.zeros(3, 6)), r"x must be \[21, d_in\], got \[3, 6\]"),
        (dict(left=torch.zeros(4, 6, 2)), r"left must be \[edits, 5, rank\], got \[4, 6, 2\]"),
        (dict(right=torch.zeros(4, 6, 3)), r"right must be \[4, 6, 2\], got \[4, 6, 3\]"),
        (dict(index=torch.zeros(21, dtype=torch.int32)), r"index must be int64 \[21\], got torch.int32"),
        (dict(x=torch.zeros(21, 6).half()), "y is torch.float32 but x is torch.float16"),
        (dict(right=torch.zeros(4, 6, 2).double()), "left and right must both be torch.float32"),
        (dict(y=torch.zeros(21, 5, dtype=torch.int64)), "y must be a floating point tensor"),
        (dict(y=torch.zeros(1, 5).expand(21, 5)), "y is expanded"),
        (dict(x=torch.zeros(21, 6, device="meta")), "one device, got y on cpu, x on meta"),
    ],
)
def test_bad_arguments(changed, message):
    names = ("y", "x", "left", "right", "index")
    arguments = dict(zip(names, case("cpu", "float32", "float32", 6, 5, 2), strict=True)) | changed
    with pytest.raises(ValueError, match=message):
        ops.low_rank_rows(**arguments)


def test_memory_shared_and_gradients_are_refused():
    y, x, left, right, index = case("cpu", "float32", "float32", 5, 5, 2)
    with pytest.raises(ValueError, match="x must not share memory with y"):
        ops.low_rank_rows(y, y, left, right, index)
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.low_rank_rows(y, x.requires_grad_(), left, right, index)
