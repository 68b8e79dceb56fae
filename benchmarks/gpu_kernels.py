"""Cases of `gpu.py`: every op at several sizes, beside the torch expressions that do the same."""

from __future__ import annotations

from functools import partial

import torch
from gpu_measure import BF16, COPY, FLOAT32, FLOAT64, Bench, Rows, check, deviation
from gpu_report import Row
from torch import Tensor
from torch.nn import functional

from knowedit_ext import ops
from knowedit_ext.ops import _native, launch_cuda, logprob, reference

GEMM = {torch.bfloat16: BF16, torch.float32: FLOAT32}
ROUNDING = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
# Off the diagonal a moment is sqrt(n) times smaller than on it; tensor cores truncate as they sum.
SUMMED = 1e-4
WEIGHT = 15000.0  # of the moment in the solved system, MEMIT's on GPT-J


def sweep_table(tokens: int, samples: int, births: int) -> tuple[Tensor, int, int]:
    """Segments of a state map: samples corrupted runs, each with `births` rounds of one child a token; keys seen."""
    lines, row, keys = [], 0, 0
    for _ in range(samples):
        parent = len(lines)
        lines.append((row, row, 0, tokens, -1))
        row += tokens
        keys += tokens * (tokens + 1) // 2
        for _ in range(births):
            for token in range(tokens):
                lines.append((row, row, token, tokens - token, parent))
                row += tokens - token
                keys += sum(range(token + 1, tokens + 1))
    return torch.tensor(lines, dtype=torch.int32), row, keys


def tree_attention(bench: Bench) -> Rows:
    sizes = bench.pick([(12, 10, 47, 25, 64), (12, 10, 27, 16, 256), (100, 4, 4, 16, 128)], [(4, 2, 2, 2, 16)])
    for tokens, samples, births, heads, d in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            yield partial(_tree_attention, bench, sweep_table(tokens, samples, births), tokens, heads, d, dtype)


def _tree_attention(
    bench: Bench, swept: tuple[Tensor, int, int], tokens: int, heads: int, d: int, dtype: torch.dtype
) -> Row:
    table, rows, keys = swept[0].to(bench.device), *swept[1:]
    q, k, v = (bench.randn(rows, heads, d, dtype=dtype, seed=seed) for seed in range(3))
    ours = lambda: ops.tree_attention(q, k, v, table, d**-0.5)  # noqa: E731
    plain = lambda: reference.tree_attention(q, k, v, table, d**-0.5)  # noqa: E731
    name = f"tree_attention {tokens} tokens, {rows} rows, {heads} x {d}, {dtype}".replace("torch.", "")
    error = check(name, deviation(ours(), plain()), ROUNDING[dtype])
    moved = 4 * rows * heads * d * dtype.itemsize  # q, k and v read once, out written once
    return Row(name, error, bench.seconds(ours), moved, COPY, {"torch": bench.seconds(plain, 3)}, {"keys": keys})


def restore_rows(bench: Bench) -> Rows:
    for count, width in bench.pick([(1200, 1600), (8192, 4096), (65536, 4096)], [(5, 8)]):
        for dtype in (torch.bfloat16, torch.float32):
            yield partial(_restore_rows, bench, count, width, dtype)


def _restore_rows(bench: Bench, count: int, width: int, dtype: torch.dtype) -> Row:
    hidden, source = bench.randn(2 * count, width, dtype=dtype), bench.randn(count, width, dtype=dtype, seed=1)
    rows = torch.randperm(2 * count, device=bench.device)[:count]
    picked = torch.randint(count, (count,), device=bench.device)
    ours = lambda: ops.restore_rows(hidden, rows, source, picked)  # noqa: E731
    plain = lambda: hidden.index_copy_(0, rows, source.index_select(0, picked))  # noqa: E731
    ours()
    name = f"restore_rows {count} x {width}, {dtype}".replace("torch.", "")
    error = check(name, deviation(hidden[rows], source[picked]), 0)
    moved = 2 * count * width * dtype.itemsize
    return Row(name, error, bench.seconds(ours), moved, COPY, {"torch": bench.seconds(plain)})


def target_logprob(bench: Bench) -> Rows:
    sizes = bench.pick([(128, 1600, 50257), (5640, 1600, 50257), (2048, 4096, 50400)], [(9, 16, 300)])
    for rows, d, vocab in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            yield partial(_target_logprob, bench, rows, d, vocab, dtype)


def _target_logprob(bench: Bench, rows: int, d: int, vocab: int, dtype: torch.dtype) -> Row:
    hidden, weight = bench.randn(rows, d, dtype=dtype), bench.randn(vocab, d, dtype=dtype, seed=1) / d**0.5
    targets = torch.randint(vocab, (rows,), device=bench.device)
    args = (hidden, weight, None, targets, 0.0)
    ours = lambda: ops.target_logprob(*args)  # noqa: E731
    whole = lambda: reference.target_logprob(*args)  # noqa: E731
    tiled = lambda: logprob.forward_by_gemm(*args)  # noqa: E731
    name = f"target_logprob {rows} x {d} x {vocab}, {dtype}".replace("torch.", "")
    some = slice(0, 64)
    logits = functional.linear(hidden[some].double(), weight.double())
    truth = logits.log_softmax(-1).gather(1, targets[some, None])[:, 0]
    error = check(name, deviation(ours()[some], truth), 1e-5)
    others = {"torch": bench.seconds(whole), "torch, in tiles": bench.seconds(tiled, 3)}
    return Row(name, error, bench.seconds(ours), 2 * rows * d * vocab, GEMM[dtype], others)


def moment_update(bench: Bench) -> Rows:
    for n, d in bench.pick([(8192, 3072), (8192, 6400), (32768, 16384)], [(40, 24)]):
        for dtype in (torch.bfloat16, torch.float32):
            yield partial(_moment_update, bench, n, d, dtype)


def _moment_update(bench: Bench, n: int, d: int, dtype: torch.dtype) -> Row:
    x = bench.randn(n, d, dtype=dtype)
    acc = torch.zeros(d, d, dtype=torch.float64, device=bench.device)
    name = f"moment_update {n} x {d}, {dtype}".replace("torch.", "")
    ops.moment_update(acc, x)
    error = check(name, deviation(acc[-256:, :256].tril(max(0, d - 256)), _corner(x)), SUMMED)
    full = torch.zeros(d, d, dtype=dtype, device=bench.device)
    native = _native.module("cuda") if bench.device == "cuda" else None
    others = {
        "torch.addmm, full": bench.seconds(lambda: full.addmm_(x.T, x), 3),
        "block-triangular GEMM": bench.seconds(lambda: ops.moment_update(acc, x, by="library"), 3),
    }
    if native is not None:
        others["our kernel"] = bench.seconds(lambda: ops.moment_update(acc, x, by="mma"), 3)
    seconds = bench.seconds(lambda: ops.moment_update(acc, x), 3)
    return Row(name, error, seconds, n * d * (d + 1), GEMM[dtype], others)


def moment_update_wgmma(bench: Bench) -> Rows:
    """By csrc/cuda/moment_update_sm90.cu, which nothing uses unless asked to."""
    yield from _by_wgmma(bench, "wgmma")


def moment_update_wgmma_pairs(bench: Bench) -> Rows:
    yield from _by_wgmma(bench, "wgmma_pairs")


def _by_wgmma(bench: Bench, by: str) -> Rows:
    if bench.device != "cuda" or torch.cuda.get_device_capability()[0] != 9:
        return
    for n, d in [(8192, 3072), (8192, 6400), (32768, 16384)]:
        for masked in (False, True):
            yield partial(_moment_update_wgmma, bench, n, d, masked, by)


def _moment_update_wgmma(bench: Bench, n: int, d: int, masked: bool, by: str) -> Row:
    x = bench.randn(n, d, dtype=torch.bfloat16)
    kept = torch.arange(n, device=bench.device) % 8 > 0 if masked else None
    acc = torch.zeros(d, d, dtype=torch.float64, device=bench.device)
    ours = lambda: ops.moment_update(acc, x, kept, by)  # noqa: E731
    name = f"moment_update by {by} {n} x {d}{', masked' if masked else ''}"
    ours()
    error = check(name, deviation(acc[-256:, :256], _corner(x if kept is None else x[kept])), SUMMED)
    others = {
        "block-triangular GEMM": bench.seconds(lambda: ops.moment_update(acc, x, kept, "library"), 3),
        "our mma kernel": bench.seconds(lambda: ops.moment_update(acc, x, kept, "mma"), 3),
    }
    return Row(name, error, bench.seconds(ours, 3), n * d * (d + 1), BF16, others)


def _corner(x: Tensor) -> Tensor:
    """The last 256 rows and first 256 columns of x^T x's lower triangle, in float64."""
    a, b = x[:, -256:].double(), x[:, :256].double()
    return (a.T @ b).tril(max(0, x.shape[1] - 256))


def cholesky(bench: Bench) -> Rows:
    for d, n in bench.pick([(6400, 1000), (16384, 1000)], [(40, 5)]):
        yield partial(_factor_and_solve, bench, d, n)
        yield partial(_factor_kept, bench, d, n)
        if bench.device == "cuda":
            yield partial(_our_factor, bench, d, torch.float64, 1e-10)
            yield partial(_our_factor, bench, d, torch.float32, 1e-4)


def _moment_and_keys(bench: Bench, d: int, n: int) -> tuple[Tensor, Tensor]:
    x = bench.randn(2 * d, d)
    return (x.T @ x / len(x)).double(), bench.randn(d, n, dtype=torch.float64, seed=1)


def _factor_and_solve(bench: Bench, d: int, n: int) -> Row:
    c, k = _moment_and_keys(bench, d, n)
    whole = lambda: ops.cholesky_solve_update(c, k, WEIGHT, factor=ops.cholesky_factor(c, WEIGHT)[0])  # noqa: E731
    lu = lambda: torch.linalg.solve(WEIGHT * c + k @ k.T, k)  # noqa: E731
    vendor = lambda: torch.cholesky_solve(k, torch.linalg.cholesky_ex(WEIGHT * c + k @ k.T)[0])  # noqa: E731
    name = f"cholesky_solve_update d {d}, n {n}, factor and solve"
    error = check(name, float(whole()[1][0]), 1e-14)
    others = {"torch.linalg.solve": bench.seconds(lu, 1), "cholesky_ex + cholesky_solve": bench.seconds(vendor, 1)}
    return Row(name, error, bench.seconds(whole, 3), d**3 / 3 + 4 * d * d * n, FLOAT64, others)


def _factor_kept(bench: Bench, d: int, n: int) -> Row:
    c, k = _moment_and_keys(bench, d, n)
    exact = ops.cholesky_factor(c, WEIGHT)[0]
    coarse = ops.cholesky_factor(c, WEIGHT, low_precision=True)[0]
    cached = lambda: ops.cholesky_solve_update(c, k, WEIGHT, factor=exact)  # noqa: E731
    refined = lambda: ops.cholesky_solve_update(c, k, WEIGHT, factor=coarse)  # noqa: E731
    name = f"cholesky_solve_update d {d}, n {n}, factor kept"
    error = check(name, float(cached()[1][0]), 1e-14)
    reached, steps, summed = refined()[1].tolist()
    facts = {"float32": {"error": reached, "steps": int(steps), "factored the sum": bool(summed)}}
    others = {"float32 factor kept, refined": bench.seconds(refined, 3)}
    return Row(name, error, bench.seconds(cached, 3), 4 * d * d * n, FLOAT64, others, facts)


def _our_factor(bench: Bench, d: int, dtype: torch.dtype, allowed: float) -> Row:
    """Our factorisation alone, which is not what the op uses unless asked to, beside the vendor's."""
    c, _ = _moment_and_keys(bench, d, 1)
    ours = lambda: launch_cuda.cholesky(_native.module("cuda"), (WEIGHT * c).to(dtype))[0]  # noqa: E731
    vendor = lambda: ops.cholesky_factor(c, WEIGHT, low_precision=dtype == torch.float32)[0]  # noqa: E731
    name = f"cholesky by our kernel, d {d}, {dtype}".replace("torch.", "")
    error = check(name, deviation(ours().tril(), ops.cholesky_factor(c, WEIGHT)[0].tril()), allowed)
    ceiling = FLOAT64 if dtype == torch.float64 else FLOAT32
    return Row(name, error, bench.seconds(ours, 3), d**3 / 3, ceiling, {"the vendor's": bench.seconds(vendor, 3)})


def low_rank_rows(bench: Bench) -> Rows:
    sizes = bench.pick([(4096, 6400, 1600, 1, 64), (4096, 16384, 4096, 1, 256)], [(9, 8, 6, 1, 3)])
    for rows, d_in, d_out, rank, edits in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            yield partial(_low_rank_rows, bench, rows, d_in, d_out, rank, edits, dtype)


def _low_rank_rows(bench: Bench, rows: int, d_in: int, d_out: int, rank: int, edits: int, dtype: torch.dtype) -> Row:
    y, x = bench.randn(rows, d_out, dtype=dtype), bench.randn(rows, d_in, dtype=dtype, seed=1)
    left = bench.randn(edits, d_out, rank, seed=2)
    right = bench.randn(edits, d_in, rank, seed=3) / d_in**0.5
    index = torch.arange(rows, device=bench.device) % edits

    def plain(into: Tensor) -> None:
        inner = (right[index] * x.float()[:, :, None]).sum(1)
        into += (left[index] @ inner[:, :, None])[:, :, 0].to(into.dtype)

    name = f"low_rank_rows {rows} x {d_in} to {d_out}, rank {rank}, {edits} edits, {dtype}".replace("torch.", "")
    ours, want = y.clone(), y.clone()
    ops.low_rank_rows(ours, x, left, right, index)
    plain(want)
    error = check(name, deviation(ours, want), ROUNDING[dtype])
    moved = (2 * rows * d_out + rows * d_in) * dtype.itemsize + 4 * edits * rank * (d_in + d_out)
    seconds = bench.seconds(lambda: ops.low_rank_rows(y, x, left, right, index))
    return Row(name, error, seconds, moved, COPY, {"torch": bench.seconds(lambda: plain(y), 3)})


CASES = {
    case.__name__: case
    for case in (
        tree_attention,
        restore_rows,
        target_logprob,
        moment_update,
        moment_update_wgmma,
        moment_update_wgmma_pairs,
        cholesky,
        low_rank_rows,
    )
}
