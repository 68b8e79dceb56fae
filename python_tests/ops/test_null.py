"""`null`, the op that others begin from: every body against the tensor itself."""

from __future__ import annotations

import pytest
import torch

from knowedit_ext import ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (5, 7), (3000, 400)])
def test_the_same_values_in_memory_of_their_own(body, shape, dtype, uninitialised_is_nan) -> None:
    x = torch.randn(shape, device=body).to(dtype)
    out = ops.null(x)
    assert torch.equal(out, x) and out.dtype == dtype and out.is_contiguous()
    assert not x.numel() or out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("view", ["rows", "columns", "transposed"])
def test_views(body, view) -> None:
    whole = torch.randn(9, 8, device=body)
    x = {"rows": whole[1::2], "columns": whole[:, 3:7], "transposed": whole.T}[view]
    assert torch.equal(ops.null(x), x.clone())


def test_opcheck_and_gradient(body) -> None:
    x = torch.randn(4, 3, device=body, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.knowedit_ext.null.default, (x,))
    assert torch.autograd.gradcheck(ops.null, (x,))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"x must be \[rows, d\], got \[3\]"):
        ops.null(torch.zeros(3))
    with pytest.raises(ValueError, match="floating point tensor, got torch.int64"):
        ops.null(torch.zeros(2, 2, dtype=torch.int64))
