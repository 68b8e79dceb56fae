"""`moment_update`: the triangle against float64, what must stay untouched, and long sums."""

from __future__ import annotations

import pytest
import torch
from ops import trees

from knowedit_ext import ops
from knowedit_ext.ops import moment

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["one piece", "many pieces"])
def pieces(request, monkeypatch):
    if request.param == "many pieces":
        monkeypatch.setattr(moment, "_ROWS", 7)
        monkeypatch.setattr(moment, "_PANEL", 5)


def problem(n: int, d: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(n + d)
    return torch.randn(n, d).to(dtype).to(device), (torch.rand(n) < 0.6).to(device)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d", [(1, 1), (3, 4), (19, 13), (129, 151), (5, 600)])
def test_matches_float64_and_leaves_the_upper_triangle(device, pieces, n, d, dtype, kind):
    x, mask = problem(n, d, dtype, device)
    products = torch.float64 if dtype == torch.float64 else torch.float32
    for m in (None, mask):
        acc = torch.ones(d, d, dtype=kind, device=device).tril()
        acc += torch.full_like(acc, 7.0).triu(1)
        ops.moment_update(acc, x, m)
        assert bool((acc.triu(1) == 7).sum() == d * (d - 1) // 2)
        kept = (x if m is None else x[m]).cpu()
        truth = (kept.double().T @ kept.double() + 1).tril()
        plain = (1 + (kept.to(products).T @ kept.to(products)).to(kind)).tril()
        allowed = max(2 * trees.error(plain, truth), 4 * torch.finfo(kind).eps)
        assert trees.error(acc.tril(), truth) <= allowed


def test_strided_rows_columns_and_masked_rubbish(device):
    x, mask = problem(40, 12, torch.float32, device)
    wide = torch.full((80, 31), float("nan"), device=device)
    wide[::2, 4:16] = x
    wide[::2, 4:16][~mask] = float("nan")
    by_column = wide[::2, 4:16].T.contiguous().T
    expected = torch.zeros(12, 12, dtype=torch.float64, device=device)
    ops.moment_update(expected, x, mask)
    for view in (wide[::2, 4:16], by_column):
        acc = torch.zeros_like(expected)
        ops.moment_update(acc, view, mask)
        torch.testing.assert_close(acc, expected, rtol=1e-6, atol=1e-6)
    into = torch.zeros(40, 40, dtype=torch.float64, device=device)
    ops.moment_update(into[3:27:2, 5:17], x, mask)  # a strided accumulator
    torch.testing.assert_close(into[3:27:2, 5:17], expected, rtol=1e-6, atol=1e-6)
    assert int((into != 0).sum()) == int((expected != 0).sum())


def test_no_rows(device):
    acc = torch.zeros(3, 3, device=device)
    ops.moment_update(acc, torch.empty(0, 3, device=device))
    ops.moment_update(acc, torch.ones(2, 3, device=device), torch.zeros(2, dtype=torch.bool, device=device))
    assert not acc.any()


def test_small_contributions_survive_a_hundred_million_keys():
    """A feature of size 1 beside one of size 1e-3 that was already summed over 1e8 keys of size 1."""
    big, step = 1e8, torch.full((1000, 2), 1e-3)
    step[:, 1] = 1.0
    exact = torch.full((2, 2), big, dtype=torch.float64)
    lossy = exact.float()
    for _ in range(100):
        ops.moment_update(exact, step)
        ops.moment_update(lossy, step)
    gained = exact.tril() - big * torch.ones(2, 2, dtype=torch.float64).tril()
    expected = 1e5 * torch.tensor([[1e-6, 0.0], [1e-3, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(gained, expected, rtol=1e-5, atol=1e-7)
    assert float(lossy[0, 0]) == big  # what a float32 sum makes of the same: nothing


def test_sums_of_many_chunks_are_as_good_as_float64():
    torch.manual_seed(0)
    x = torch.randn(200_000, 8) * torch.logspace(-3, 1, 8)
    acc = torch.zeros(8, 8, dtype=torch.float64)
    for part in x.split(10_000):
        ops.moment_update(acc, part)
    truth = x.double().T @ x.double()
    size = truth.diagonal().sqrt()
    assert float(((acc - truth).tril().abs() / (size[:, None] * size)).max()) < 1e-6


def test_equal_calls_give_equal_bits(device):
    x, mask = problem(5000, 64, torch.float32, device)
    first, second = (torch.zeros(64, 64, dtype=torch.float64, device=device) for _ in range(2))
    ops.moment_update(first, x, mask)
    ops.moment_update(second, x.clone(), mask)
    assert torch.equal(first, second)


def test_opcheck_and_version_counter(device):
    x, mask = problem(6, 4, torch.float32, device)
    acc = torch.zeros(4, 4, dtype=torch.float64, device=device)
    torch.library.opcheck(torch.ops.knowedit_ext.moment_update.default, (acc, x, mask))
    version = acc._version
    ops.moment_update(acc, x)
    assert acc._version > version


def test_bad_arguments_write_nothing():
    acc = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"x must be \[n, 3\], got \[2, 4\]"):
        ops.moment_update(acc, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"acc must be \[d, d\]"):
        ops.moment_update(torch.zeros(3, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="acc must be float32 or float64"):
        ops.moment_update(acc.half(), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mask must be bool \[2\]"):
        ops.moment_update(acc, torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match="floating point"):
        ops.moment_update(acc, torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="by is 'vendor', expected one of 'auto', .* 'wgmma', 'wgmma_pairs'"):
        ops.moment_update(acc, torch.ones(2, 3), by="vendor")
    for by in ("mma", "wgmma", "wgmma_pairs"):
        with pytest.raises(ValueError, match=f"by='{by}' is a CUDA kernel, the tensors are on cpu"):
            ops.moment_update(acc, torch.ones(2, 3), by=by)
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.moment_update(acc, torch.ones(2, 3, requires_grad=True))
    assert not acc.any()
