"""`cholesky_solve_update`: backward error against float64, by Woodbury and by factoring the sum."""

from __future__ import annotations

import pytest
import torch

from knowedit_ext import ops
from knowedit_ext.ops import cholesky


def moment(d: int, condition: float, dtype=torch.float64) -> torch.Tensor:
    """A symmetric matrix with eigenvalues from 1 / condition to 1, log-spaced."""
    torch.manual_seed(d)
    q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    c = (q * torch.logspace(-torch.log10(torch.tensor(condition)).item(), 0, d, dtype=torch.float64)) @ q.T
    return ((c + c.T) / 2).to(dtype)


def keys(d: int, n: int, scale: float = 1.0) -> torch.Tensor:
    torch.manual_seed(d + n)
    return scale * torch.randn(d, n, dtype=torch.float64)


def backward_error(c: torch.Tensor, k: torch.Tensor, weight: float, s: torch.Tensor, ridge: float = 0.0) -> float:
    """The contract's measure with the spectral norm of A, worst column."""
    c, k = c.double(), k.double()
    a = weight * (c + ridge * torch.eye(len(c), dtype=torch.float64)) + k @ k.T
    residual = (k - a @ s).norm(dim=0)
    return float((residual / (torch.linalg.matrix_norm(a, 2) * s.norm(dim=0) + k.norm(dim=0))).max())


@pytest.mark.parametrize("scale", [1e-3, 1.0])
@pytest.mark.parametrize("weight", [1.0, 15000.0])
@pytest.mark.parametrize("condition", [1e1, 1e6, 1e10])
@pytest.mark.parametrize("n", [1, 20, 150])
def test_backward_error(device, n, condition, weight, scale):
    c, k = moment(200, condition).to(device), keys(200, n, scale).to(device)
    factor, info = ops.cholesky_factor(c, weight)
    assert int(info) == 0
    for given in (factor, None):
        s, report, info = ops.cholesky_solve_update(c, k, weight, 0.0, given)
        assert int(info) == 0 and s.dtype == torch.float64
        assert backward_error(c.cpu(), k.cpu(), weight, s.cpu()) <= 1e-14
        assert float(report[0]) <= 1e-14


def test_keys_so_large_that_woodbury_cancels(device):
    c, k = moment(200, 1e5).to(device), keys(200, 20, 300.0).to(device)  # the sum's condition is 1e12
    factor, _ = ops.cholesky_factor(c, 1.0)
    s, report, _ = ops.cholesky_solve_update(c, k, 1.0, factor=factor)
    assert backward_error(c.cpu(), k.cpu(), 1.0, s.cpu()) <= 1e-14


def test_a_sum_beyond_float64_is_said():
    c, k = moment(200, 1e10), keys(200, 20, 1e3)  # condition 1e18
    s, report, info = ops.cholesky_solve_update(c, k, 1.0, factor=ops.cholesky_factor(c, 1.0)[0])
    if int(info):
        assert bool(s.isnan().all())
    else:
        assert float(report[0]) >= 0.5 * backward_error(c, k, 1.0, s)


def test_matches_lu(device):
    c, k = moment(120, 1e4).to(device), keys(120, 7).to(device)
    want = torch.linalg.solve(50 * c + k @ k.T, k)
    factor, _ = ops.cholesky_factor(c, 50.0)
    for given in (factor, None):
        s, _, _ = ops.cholesky_solve_update(c, k, 50.0, factor=given)
        assert float((s - want).norm() / want.norm()) < 1e-10


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_layouts_of_the_moment(monkeypatch, dtype, layout):
    monkeypatch.setattr(cholesky, "_BLOCK", 16)
    c, k = moment(50, 1e3, dtype), keys(50, 5)
    wide = torch.zeros(100, 75, dtype=dtype)
    wide[::2, 5:55] = c
    source = {"rows": c, "columns": c.T.contiguous().T, "strided": wide[::2, 5:55]}[layout]
    factor, _ = ops.cholesky_factor(source, 3.0)
    for given in (factor, None):
        s, _, _ = ops.cholesky_solve_update(source, k, 3.0, factor=given)
        assert backward_error(c, k, 3.0, s) <= 1e-14


def test_norm_bound():
    for c in (moment(60, 1e6), torch.ones(60, 60), torch.zeros(3, 3)):
        size, bound = float(torch.linalg.matrix_norm(c.double(), 2)), cholesky.norm_bound(c)
        assert 0.5 * size <= bound <= size * (1 + 1e-12)


def test_the_factor_is_that_of_the_weighted_matrix():
    c = moment(30, 1e3)
    factor, info = ops.cholesky_factor(c, 7.0, 0.1)
    lower = factor.tril()
    torch.testing.assert_close(lower @ lower.T, 7 * (c + 0.1 * torch.eye(30, dtype=torch.float64)))
    assert int(info) == 0


def test_a_low_precision_factor_is_refined_where_it_converges():
    k = keys(200, 10)
    good, bad = moment(200, 1e3), moment(200, 1e10)
    factor, info = ops.cholesky_factor(good, 2.0, 0.0, True)
    assert factor.dtype == torch.float32 and int(info) == 0
    s, report, _ = ops.cholesky_solve_update(good, k, 2.0, factor=factor)
    assert backward_error(good, k, 2.0, s) <= 1e-14 and 1 <= int(report[1]) <= 10
    coarse, info = ops.cholesky_factor(bad, 2.0, 1e-6, True)  # stands for a factor too coarse for its matrix
    s, report, _ = ops.cholesky_solve_update(bad, k, 2.0, factor=coarse)
    assert backward_error(bad, k, 2.0, s) <= 1e-14 and bool(report[2])  # float64 did it


def test_not_positive_definite_is_reported():
    c = moment(40, 1e2)
    c[17, 17] = -1.0
    _, info = ops.cholesky_factor(c, 2.0)
    assert int(info) == 18
    s, report, info = ops.cholesky_solve_update(c, keys(40, 30, 1e-3), 2.0)
    assert int(info) == 18 and bool(s.isnan().all()) and bool(report[0].isnan())


def test_ridge():
    c, k = torch.zeros(20, 20, dtype=torch.float64), keys(20, 2)
    factor, _ = ops.cholesky_factor(c, 4.0, 0.5)
    for given in (factor, None):
        s, _, _ = ops.cholesky_solve_update(c, k, 4.0, 0.5, given)
        assert backward_error(c, k, 4.0, s, ridge=0.5) <= 1e-14


def test_no_keys():
    s, report, info = ops.cholesky_solve_update(moment(5, 10.0), torch.empty(5, 0), 1.0)
    assert s.shape == (5, 0) and float(report[0]) == 0 and int(info) == 0


def test_opcheck():
    c, k = moment(8, 10.0), keys(8, 2)
    factor, _ = ops.cholesky_factor(c, 1.0)
    torch.library.opcheck(torch.ops.knowedit_ext.cholesky_factor.default, (c, 1.0))
    torch.library.opcheck(torch.ops.knowedit_ext.cholesky_solve_update.default, (c, k, 1.0, 0.0, factor))


def test_inputs_are_left_alone():
    c, k = moment(30, 1e2), keys(30, 20)
    before = c.clone(), k.clone()
    ops.cholesky_factor(c, 2.0)
    ops.cholesky_solve_update(c, k, 2.0)
    assert torch.equal(c, before[0]) and torch.equal(k, before[1])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(moment=torch.ones(3, 4)), r"moment must be \[d, d\]"),
        (dict(moment=torch.eye(3).half()), "moment must be float32 or float64"),
        (dict(keys=torch.ones(4, 1)), r"keys must be \[3, n\]"),
        (dict(weight=0.0), "weight must be positive"),
        (dict(weight=float("nan")), "weight must be positive"),
        (dict(ridge=-1.0), "ridge must be >= 0"),
        (dict(factor=torch.eye(4)), r"factor must be \[3, 3\]"),
        (dict(by="mine"), "by is 'mine', expected one of 'library', 'kernel'"),
        (dict(by="kernel"), "by='kernel' is a CUDA kernel, the tensors are on cpu"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ops.cholesky_solve_update(**(dict(moment=torch.eye(3), keys=torch.ones(3, 1), weight=1.0) | change))
