"""`restore_rows`: every body against indexing in float64."""

from __future__ import annotations

import pytest
import torch

from knowedit_ext import ops

PAIRS = [(h, s) for h in ("float32", "float64", "bfloat16", "float16") for s in {h: 0, "float32": 0, "float64": 0}]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("width", [1, 7, 64, 129])
@pytest.mark.parametrize("hidden_dtype, source_dtype", PAIRS)
def test_matches_indexing_and_leaves_the_rest_alone(body, hidden_dtype, source_dtype, width, add):
    torch.manual_seed(0)
    buffer = torch.full((12, width + 5), float("nan"), dtype=getattr(torch, hidden_dtype), device=body)
    hidden = buffer[1:11, 3 : 3 + width]  # an offset and a row stride of its own
    hidden.copy_(torch.randn(10, width))
    source = torch.randn(6, 2 * width, device=body, dtype=getattr(torch, source_dtype))[:, width:]
    rows, source_rows = torch.tensor([9, 0, 4], device=body), torch.tensor([5, 2, 5], device=body)
    expected = hidden.clone()
    picked = source[source_rows]
    expected[rows] = (expected[rows] + picked if add else picked).to(hidden.dtype)
    assert ops.restore_rows(hidden, rows, source, source_rows, add) is None
    assert torch.equal(hidden, expected)  # bit for bit: one rounding, as in torch
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[1:11, 3 : 3 + width] = False
    assert buffer[outside].isnan().all()


def test_one_matrix_is_both_source_and_target(body):
    hidden = torch.randn(9, 5, device=body)
    before = hidden.clone()
    rows, source_rows = torch.tensor([1, 8], device=body), torch.tensor([0, 0], device=body)
    ops.restore_rows(hidden, rows, hidden, source_rows)
    assert torch.equal(hidden[rows], before[[0, 0]]) and torch.equal(hidden[[0, 2, 3, 7]], before[[0, 2, 3, 7]])


def test_overlapping_views_read_before_they_write(body):
    buffer = torch.randn(8, 5, device=body)
    before = buffer.clone()
    three = torch.arange(3, device=body)
    ops.restore_rows(buffer[1:], three, buffer, three)
    assert torch.equal(buffer[1:4], before[:3])


def test_innermost_stride_other_than_one(body):
    hidden, source = torch.zeros(5, 8, device=body).T, torch.randn(5, 8, device=body).T
    one = torch.tensor([2], device=body)
    ops.restore_rows(hidden, one, source, one)
    assert torch.equal(hidden[2], source[2]) and not hidden[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_and_threaded(body, dtype):
    hidden, source = torch.zeros(3000, 768, dtype=dtype, device=body), torch.randn(3000, 768, device=body).to(dtype)
    rows, source_rows = torch.randperm(3000, device=body)[:2500], torch.randint(0, 3000, (2500,), device=body)
    ops.restore_rows(hidden, rows, source, source_rows)
    assert torch.equal(hidden[rows], source[source_rows]) and int(hidden.any(1).sum()) == 2500


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan"), 6e-8, 65519.0, 65520.0, 3.4e38, -0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_special_values(body, dtype, special):
    hidden, zero = torch.zeros(1, 1, dtype=dtype, device=body), torch.tensor([0], device=body)
    source = torch.tensor([[special]], device=body)
    ops.restore_rows(hidden, zero, source, zero)
    torch.testing.assert_close(hidden, source.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(hidden), torch.signbit(source)) or special != special


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_value_survives_a_sum_with_zero(body, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[None].to(body)
    hidden, zero = every.clone(), torch.tensor([0], device=body)
    ops.restore_rows(hidden, zero, torch.zeros(1, 2**16, device=body), zero, True)
    torch.testing.assert_close(hidden, every, rtol=0, atol=0, equal_nan=True)


def test_opcheck_and_version_counter(body):
    hidden, source = torch.randn(4, 3, device=body), torch.randn(2, 3, device=body)
    rows, source_rows = torch.tensor([3, 1], device=body), torch.tensor([0, 1], device=body)
    torch.library.opcheck(torch.ops.knowedit_ext.restore_rows.default, (hidden, rows, source, source_rows, True))
    version = hidden._version
    ops.restore_rows(hidden, rows, source, source_rows)
    assert hidden._version > version
    with torch.inference_mode():
        ops.restore_rows(torch.zeros(4, 3, device=body), rows, source, source_rows)


def test_no_rows(body):
    hidden, none = torch.zeros(2, 3, device=body), torch.empty(0, dtype=torch.int64, device=body)
    ops.restore_rows(hidden, none, hidden, none)


@pytest.mark.parametrize(
    "rows, source_rows, error, message",
    [
        ([4], [0], IndexError, "rows holds 4, outside 0..3"),
        ([-1], [0], IndexError, "rows holds -1"),
        ([0], [2], IndexError, "source_rows holds 2, outside 0..1"),
        ([1, 1], [0, 1], ValueError, "unique"),
        ([1, 2], [0], ValueError, r"source_rows must be int64 \[2\]"),
        ([1.0], [0], ValueError, r"rows must be int64 \[m\]"),
    ],
)
def test_bad_rows_write_nothing(rows, source_rows, error, message):
    hidden = torch.zeros(4, 3)
    with pytest.raises(error, match=message):
        ops.restore_rows(hidden, torch.tensor(rows), torch.ones(2, 3), torch.tensor(source_rows))
    assert not hidden.any()


def test_bad_arguments():
    zero = torch.tensor([0])
    with pytest.raises(ValueError, match=r"source must be \[n, 3\]"):
        ops.restore_rows(torch.zeros(4, 3), zero, torch.ones(2, 4), zero)
    with pytest.raises(ValueError, match="source must be torch.float32, float32 or float64, got torch.float16"):
        ops.restore_rows(torch.zeros(4, 3), zero, torch.ones(2, 3).half(), zero)
    with pytest.raises(ValueError, match="disjoint"):
        ops.restore_rows(same := torch.zeros(4, 3), torch.tensor([0, 1]), same, torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.restore_rows(torch.zeros(4, 3, requires_grad=True).clone(), zero, torch.ones(2, 3), zero)
