"""What only a GPU shows of every op: streams, graphs, equal bits, errors with the op's name.

Tests named `sanitized` are small enough for compute-sanitizer, which `benchmarks/gpu.py` runs them under.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops import trees

from knowedit_ext import ops
from knowedit_ext.ops import _native, launch, launch_cuda

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
Call = Callable[[], torch.Tensor]


def cases(device: str, ours: bool = False) -> dict[str, Call]:
    """A call of every op at an odd size; each makes its own output. ours: by our kernels what a library could do."""
    update_by, factor_by = ("mma", "kernel") if ours else ("library", "library")
    torch.manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    segments, rows = trees.forest([5, 3, 4])
    q, k, v = (draw(rows, heads, 24) for heads in (4, 2, 2))
    table = segments.to(device)
    hidden, source = draw(9, 37), draw(4, 37)
    at, picked = (torch.tensor(x, device=device) for x in ([7, 0, 3], [1, 1, 2]))
    states, head, bias = draw(130, 40), draw(300, 40), draw(300)
    targets = torch.randint(0, 300, (130, 2)).to(device)
    keys, mask = draw(70, 137), (torch.rand(70) < 0.7).to(device)
    y, left, right = draw(9, 21), draw(3, 21, 2), draw(3, 37, 2)
    index = torch.tensor([0, 2, -1, 1, 1, 0, 2, 2, 1], device=device)

    def in_place(op: Callable[..., None], into: torch.Tensor, *args: torch.Tensor | str | None) -> torch.Tensor:
        out = into.clone()
        op(out, *args)
        return out

    acc = torch.zeros(137, 137, dtype=torch.float64, device=device)
    wide = draw(200, 137, dtype=torch.float64)
    moments = wide.T @ wide
    return {
        "tree_attention": lambda: ops.tree_attention(q, k, v, table, 0.2, 3, 5.0),
        "restore_rows": lambda: in_place(ops.restore_rows, hidden, at, source, picked),
        "target_logprob": lambda: ops.target_logprob(states, head, bias, targets, 2.0),
        "target_logprob bfloat16": lambda: ops.target_logprob(*(x.bfloat16() for x in (states, head, bias)), targets),
        "moment_update": lambda: in_place(ops.moment_update, acc, keys, mask, update_by),
        "moment_update bfloat16": lambda: in_place(ops.moment_update, acc, keys.bfloat16(), mask, update_by),
        "cholesky_factor": lambda: ops.cholesky_factor(moments, 2.0, by=factor_by)[0].tril(),
        "cholesky_factor float32": lambda: ops.cholesky_factor(moments, 2.0, 0.0, True, factor_by)[0].tril(),
        "null": lambda: ops.null(hidden),
        "low_rank_rows": lambda: in_place(ops.low_rank_rows, y, hidden, left, right, index),
    }


NAMES = list(cases("cpu"))


by_either = pytest.mark.parametrize("ours", [True, False], ids=["kernel", "library"])


def only_ours(name: str, ours: bool) -> None:
    """Whether the library's factorisation waits for the device is its own affair."""
    if name.startswith("cholesky_factor") and not ours:
        pytest.skip("the library's")


@needs_cuda
@by_either
@pytest.mark.parametrize("name", NAMES)
def test_sanitized_cuda_agrees_with_the_cpu(ours, name):
    assert trees.error(cases("cuda", ours)[name](), cases("cpu")[name]().double()) < 1e-5


@needs_cuda
@by_either
@pytest.mark.parametrize("name", NAMES)
def test_cuda_on_another_stream(ours, name):
    """Behind work that is not done yet on that stream, and with no wait for the device."""
    only_ours(name, ours)
    call = cases("cuda", ours)[name]
    want, stream = call(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        before = torch.cuda.Event()
        before.record()
        got = call()
        assert not before.query()  # the call came back while the stream was still asleep
    stream.synchronize()
    assert torch.equal(got, want)


@needs_cuda
@by_either
@pytest.mark.parametrize("name", NAMES)
def test_cuda_graphs_replay_it(ours, name):
    only_ours(name, ours)
    call = cases("cuda", ours)[name]
    want = call()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for _ in range(2):
        got.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, want)


@needs_cuda
@by_either
@pytest.mark.parametrize("name", NAMES)
def test_cuda_gives_equal_bits_twice(ours, name):
    call = cases("cuda", ours)[name]
    assert torch.equal(call(), call())


@needs_cuda
def test_cuda_targets_outside_the_vocabulary_give_nan():
    hidden, weight = torch.randn(3, 8, device="cuda"), torch.randn(30, 8, device="cuda")
    out = ops.target_logprob(hidden, weight, None, torch.tensor([30, 4, -1], device="cuda"))
    assert out.isnan().tolist() == [True, False, True]


@needs_cuda
@pytest.mark.parametrize("by", ["auto", "library", "mma"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_moments_of_many_rows(by, dtype):
    """Longer than what is summed in float, in all three tiles of the triangle."""
    torch.manual_seed(0)
    x = (torch.randn(9000, 200) * torch.logspace(-2, 1, 200)).to("cuda", dtype)
    acc = torch.zeros(200, 200, dtype=torch.float64, device="cuda")
    ops.moment_update(acc, x, by=by)
    truth = (x.double().T @ x.double()).tril()
    size = truth.diagonal().sqrt()
    plain = (x.float().T @ x.float()).double().tril()
    error, plain_error = (float(((y - truth) / (size[:, None] * size)).abs().max()) for y in (acc, plain))
    assert error <= max(2 * plain_error, 2e-5 if dtype != torch.float32 else 0)


@needs_cuda
@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("d", [1, 64, 65, 300, 700])
def test_cuda_factors_by_our_kernel(d, low_precision):
    """In float64, and in float32, which the solution is refined from."""
    torch.manual_seed(d)
    x = torch.randn(2 * d, d, dtype=torch.float64, device="cuda")
    c = x.T @ x / (2 * d)
    factor, info = ops.cholesky_factor(c, 3.0, 0.1, low_precision, "kernel")
    lower, want = factor.tril().double(), 3 * (c + 0.1 * torch.eye(d, device="cuda", dtype=torch.float64))
    assert int(info) == 0 and trees.error(lower @ lower.T, want.cpu()) < (1e-6 if low_precision else 1e-14)
    s, report, _ = ops.cholesky_solve_update(c, x[: max(1, d // 8)].T.contiguous(), 3.0, 0.1, factor, by="kernel")
    assert float(report[0]) <= 1e-14
    c[d // 2, d // 2] = -1
    assert int(ops.cholesky_factor(c, 3.0, 0.0, low_precision, "kernel")[1]) == d // 2 + 1


HALVES = [torch.bfloat16, torch.float16]
in_pairs_or_not = pytest.mark.parametrize("by", ["wgmma", "wgmma_pairs"])


def wgmma_is_right(x: torch.Tensor, by: str) -> None:
    """x^T x by wgmma against float64, and the second moments of some rows; ValueError where TMA does not read x."""
    d = x.shape[1]
    acc = torch.zeros(d, d, dtype=torch.float64, device="cuda")
    mask = torch.arange(len(x), device="cuda") % 5 < 3
    for kept in (None, mask):
        rows = x if kept is None else x.clone().masked_fill_(~kept[:, None], float("nan"))
        if kept is not None and x.stride(0) != d:  # keep the stride
            rows = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(rows)
        acc.fill_(1)
        ops.moment_update(acc, rows, kept, by)
        whole = (x if kept is None else x[kept]).double()
        assert trees.error(acc.tril(), (whole.T @ whole + 1).tril().cpu()) < 1e-5
        assert torch.equal(acc.triu(1), torch.ones_like(acc).triu(1))


@pytest.fixture
def hopper():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU")
    if "90a-real" not in _native.module("cuda").cuda_archs():
        pytest.skip("the native module holds no code for sm_90a")


@in_pairs_or_not
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n, d", [(1, 8), (70, 136), (64, 256), (300, 520), (9000, 392)])
def test_sanitized_cuda_moments_by_wgmma(hopper, dtype, n, d, by):
    torch.manual_seed(d)
    wgmma_is_right(torch.randn(n, d, device="cuda").to(dtype), by)


@in_pairs_or_not
@pytest.mark.parametrize("dtype", HALVES)
def test_cuda_moments_by_wgmma_of_strided_rows(hopper, dtype, by):
    x = torch.randn(200, 320, device="cuda").to(dtype)
    wgmma_is_right(x[:, 8:301], by)  # an odd width, at 16 bytes
    for refused in (x[:, 4:300], x[:, :299].contiguous()):
        with pytest.raises(ValueError, match=f"by='{by}' needs"):
            wgmma_is_right(refused, by)


@in_pairs_or_not
def test_cuda_op_by_wgmma(hopper, by):
    """The op on another stream and in a graph."""
    x = torch.randn(200, 256, device="cuda").bfloat16()
    acc, again = (torch.zeros(256, 256, dtype=torch.float64, device="cuda") for _ in range(2))
    ops.moment_update(acc, x, by=by)
    assert trees.error(acc, (x.double().T @ x.double()).tril().cpu()) < 1e-5
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        ops.moment_update(again, x, by=by)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        ops.moment_update(again, x, by=by)
    again.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(again, acc)


# ---- without a GPU: what the native module is handed, and what it says ----


@pytest.fixture
def compiled(monkeypatch):
    """The native module with CUDA bodies; launches meet a machine without a device."""
    native, reason = _native.status("cuda")
    if native is None:
        pytest.skip(reason)
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    for module in (launch, launch_cuda):
        monkeypatch.setattr(module, "_stream", lambda tensor: (0, 0))
    return native


def test_errors_of_a_launch_name_the_op(compiled):
    hidden, weight, targets = torch.randn(3, 8), torch.randn(30, 8), torch.tensor([1, 2, 3])
    with pytest.raises(RuntimeError, match="^target_logprob on CUDA: "):
        launch_cuda.target_logprob(compiled, hidden, weight, None, targets, 0.0)
    with pytest.raises(RuntimeError, match="^moment_update on CUDA: "):
        launch_cuda.moment_update(compiled, torch.zeros(8, 8), hidden, None, 4096)
    with pytest.raises(RuntimeError, match="^cholesky on CUDA: "):
        launch_cuda.cholesky(compiled, torch.eye(4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="^cholesky on CUDA: "):
        launch_cuda.cholesky(compiled, torch.eye(4))


def test_wgmma_is_asked_for_only_where_tma_reads_the_rows(compiled):
    acc, memory = torch.zeros(8, 8), torch.zeros(4, 16, dtype=torch.bfloat16)
    refusals = [(memory[:, :8], RuntimeError, "^moment_update on CUDA: "), (memory[:, 1:8], ValueError, "16 bytes")]
    for x, error, words in refusals:  # the machine is asked only where TMA reads the rows
        with pytest.raises(error, match=words):
            launch_cuda.moment_update(compiled, acc[: x.shape[1], : x.shape[1]], x, None, 4096, "wgmma")
    params = dict(acc=0, mask=0, acc_dtype=0, rows=4, acc_stride=8, sum_rows=64)
    for at, dtype, width, stride in [(2, 2, 8, 8), (0, 2, 7, 7), (0, 2, 16, 8), (0, 0, 8, 8)]:
        refused = compiled.MomentUpdate(x=4096 + at, x_dtype=dtype, width=width, x_stride=stride, **params)
        assert not compiled.moment_update_has_wgmma(refused, 0)


def test_nothing_to_do_needs_no_device(compiled):
    weight = torch.randn(30, 8)
    none = launch_cuda.target_logprob(compiled, weight[:0], weight, None, torch.empty(0, 2, dtype=torch.int64), 0.0)
    assert none.shape == (0, 2)
    launch_cuda.moment_update(compiled, torch.zeros(8, 8), weight[:0], None, 4096)
