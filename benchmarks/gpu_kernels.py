"""Cases of `gpu.py`: every op at several sizes, beside the torch expressions that do the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_measure import BF16, COPY, FLOAT32, FLOAT64, Bench, Row, check, deviation
from torch import Tensor
from torch.nn import functional

from knowedit_ext import ops
from knowedit_ext.ops import _native, launch_cuda, logprob, moment, reference

GEMM = {torch.bfloat16: BF16, torch.float32: FLOAT32}
ROUNDING = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


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


def tree_attention(bench: Bench) -> Iterator[Row]:
    sizes = bench.pick([(12, 10, 47, 25, 64), (12, 10, 27, 16, 256), (100, 4, 4, 16, 128)], [(4, 2, 2, 2, 16)])
    for tokens, samples, births, heads, d in sizes:
        table, rows, keys = sweep_table(tokens, samples, births)
        table = table.to(bench.device)
        for dtype in (torch.bfloat16, torch.float32):
            q, k, v = (bench.randn(rows, heads, d, dtype=dtype, seed=seed) for seed in range(3))
            ours = lambda: ops.tree_attention(q, k, v, table, d**-0.5)  # noqa: B023, E731
            plain = lambda: reference.tree_attention(q, k, v, table, d**-0.5)  # noqa: B023, E731
            name = f"tree_attention {tokens} tokens, {rows} rows, {heads} x {d}, {dtype}".replace("torch.", "")
            error = check(name, deviation(ours(), plain()), ROUNDING[dtype])
            moved = 4 * rows * heads * d * dtype.itemsize  # q, k and v read once, out written once
            yield Row(name, error, bench.seconds(ours), moved, COPY, {"torch": bench.seconds(plain, 3)}, {"keys": keys})


def restore_rows(bench: Bench) -> Iterator[Row]:
    for count, width in bench.pick([(1200, 1600), (8192, 4096), (65536, 4096)], [(5, 8)]):
        for dtype in (torch.bfloat16, torch.float32):
            hidden, source = bench.randn(2 * count, width, dtype=dtype), bench.randn(count, width, dtype=dtype, seed=1)
            rows = torch.randperm(2 * count, device=bench.device)[:count]
            picked = torch.randint(count, (count,), device=bench.device)
            ours = lambda: ops.restore_rows(hidden, rows, source, picked)  # noqa: B023, E731
            plain = lambda: hidden.index_copy_(0, rows, source.index_select(0, picked))  # noqa: B023, E731
            ours()
            name = f"restore_rows {count} x {width}, {dtype}".replace("torch.", "")
            error = check(name, deviation(hidden[rows], source[picked]), 0)
            moved = 2 * count * width * dtype.itemsize
            yield Row(name, error, bench.seconds(ours), moved, COPY, {"torch": bench.seconds(plain)})


def target_logprob(bench: Bench) -> Iterator[Row]:
    sizes = bench.pick([(128, 1600, 50257), (5640, 1600, 50257), (2048, 4096, 50400)], [(9, 16, 300)])
    for rows, d, vocab in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            hidden, weight = bench.randn(rows, d, dtype=dtype), bench.randn(vocab, d, dtype=dtype, seed=1) / d**0.5
            targets = torch.randint(vocab, (rows,), device=bench.device)
            args = (hidden, weight, None, targets, 0.0)
            ours = lambda: ops.target_logprob(*args)  # noqa: B023, E731
            whole = lambda: reference.target_logprob(*args)  # noqa: B023, E731
            tiled = lambda: logprob.forward_by_gemm(*args)  # noqa: B023, E731
            name = f"target_logprob {rows} x {d} x {vocab}, {dtype}".replace("torch.", "")
            some = slice(0, 64)
            logits = functional.linear(hidden[some].double(), weight.double())
            truth = logits.log_softmax(-1).gather(1, targets[some, None])[:, 0]
            error = check(name, deviation(ours()[some], truth), 1e-5)
            others = {"torch": bench.seconds(whole), "torch, in tiles": bench.seconds(tiled, 3)}
            yield Row(name, error, bench.seconds(ours), 2 * rows * d * vocab, GEMM[dtype], others)


def moment_update(bench: Bench) -> Iterator[Row]:
    for n, d in bench.pick([(8192, 3072), (8192, 6400), (32768, 16384)], [(40, 24)]):
        for dtype in (torch.bfloat16, torch.float32):
            x = bench.randn(n, d, dtype=dtype)
            acc = torch.zeros(d, d, dtype=torch.float64, device=bench.device)
            name = f"moment_update {n} x {d}, {dtype}".replace("torch.", "")
            ops.moment_update(acc, x)
            error = check(name, deviation(acc[-256:, :256].tril(max(0, d - 256)), _corner(x)), 1e-5)
            full = torch.zeros(d, d, dtype=dtype, device=bench.device)
            native = _native.module("cuda") if bench.device == "cuda" else None
            others = {
                "torch.addmm, full": bench.seconds(lambda: full.addmm_(x.T, x), 3),  # noqa: B023
                "block-triangular GEMM": bench.seconds(lambda: moment.update_by_gemm(acc, x, None), 3),  # noqa: B023
            }
            if native is not None:
                kernel = lambda: launch_cuda.moment_update(native, acc, x, None, moment._ROWS)  # noqa: B023, E731
                others["our kernel"] = bench.seconds(kernel, 3)
            seconds = bench.seconds(lambda: ops.moment_update(acc, x), 3)  # noqa: B023
            yield Row(name, error, seconds, n * d * (d + 1), GEMM[dtype], others)


def moment_update_wgmma(bench: Bench) -> Iterator[Row]:
    """By csrc/cuda/moment_update_sm90.cu, which nothing uses unless asked to."""
    if bench.device != "cuda" or torch.cuda.get_device_capability()[0] != 9:
        return
    native = _native.module("cuda")
    for n, d in [(8192, 3072), (8192, 6400), (32768, 16384)]:
        x = bench.randn(n, d, dtype=torch.bfloat16)
        mask = torch.arange(n, device=bench.device) % 8 > 0
        acc = torch.zeros(d, d, dtype=torch.float64, device=bench.device)
        for kept in (None, mask):

            def ours() -> None:
                if not launch_cuda.moment_update(native, acc, x, kept, moment._ROWS, wgmma=True):  # noqa: B023
                    raise RuntimeError("this build holds no wgmma kernel")

            name = f"moment_update by wgmma {n} x {d}{'' if kept is None else ', masked'}"
            acc.zero_()
            ours()
            error = check(name, deviation(acc[-256:, :256], _corner(x if kept is None else x[kept])), 1e-5)
            others = {
                "block-triangular GEMM": bench.seconds(lambda: moment.update_by_gemm(acc, x, kept), 3),  # noqa: B023
                "our mma kernel": bench.seconds(
                    lambda: launch_cuda.moment_update(native, acc, x, kept, moment._ROWS),  # noqa: B023
                    3,
                ),
            }
            yield Row(name, error, bench.seconds(ours, 3), n * d * (d + 1), BF16, others)


def _corner(x: Tensor) -> Tensor:
    """The last 256 rows and first 256 columns of x^T x's lower triangle, in float64."""
    a, b = x[:, -256:].double(), x[:, :256].double()
    return (a.T @ b).tril(max(0, x.shape[1] - 256))


def cholesky(bench: Bench) -> Iterator[Row]:
    for d, n in bench.pick([(6400, 1000), (16384, 1000)], [(40, 5)]):
        x = bench.randn(2 * d, d)
        c = (x.T @ x / len(x)).double()
        k = bench.randn(d, n, dtype=torch.float64, seed=1)
        weight = 15000.0
        factor = ops.cholesky_factor(c, weight)[0]
        cached = lambda: ops.cholesky_solve_update(c, k, weight, factor=factor)  # noqa: B023, E731
        whole = lambda: ops.cholesky_solve_update(c, k, weight, factor=ops.cholesky_factor(c, weight)[0])  # noqa: B023, E731
        lu = lambda: torch.linalg.solve(weight * c + k @ k.T, k)  # noqa: B023, E731
        vendor = lambda: torch.cholesky_solve(k, torch.linalg.cholesky_ex(weight * c + k @ k.T)[0])  # noqa: B023, E731
        name = f"cholesky_solve_update d {d}, n {n}"
        error = check(name, float(cached()[1][0]), 1e-14)
        others = {"torch.linalg.solve": bench.seconds(lu, 1), "cholesky_ex + cholesky_solve": bench.seconds(vendor, 1)}
        if bench.device == "cuda":
            by_kernel = lambda: launch_cuda.cholesky(_native.module("cuda"), weight * c)[0]  # noqa: B023, E731
            check(f"our factor, d {d}", deviation(by_kernel().tril(), factor.tril()), 1e-10)
            others["our factorisation alone"] = bench.seconds(by_kernel, 3)
            others["the vendor's alone"] = bench.seconds(lambda: ops.cholesky_factor(c, weight), 3)  # noqa: B023
            single = lambda: launch_cuda.cholesky(_native.module("cuda"), (weight * c).float())[0]  # noqa: B023, E731
            check(f"our float32 factor, d {d}", deviation(single().tril(), factor.tril()), 1e-4)
            others["our float32 factorisation alone"] = bench.seconds(single, 3)
            others["the vendor's in float32 alone"] = bench.seconds(
                lambda: ops.cholesky_factor(c, weight, low_precision=True),  # noqa: B023
                3,
            )
        yield Row(
            f"{name}, factor and solve", error, bench.seconds(whole, 3), d**3 / 3 + 4 * d * d * n, FLOAT64, others
        )
        coarse = ops.cholesky_factor(c, weight, low_precision=True)[0]
        refined = lambda: ops.cholesky_solve_update(c, k, weight, factor=coarse)  # noqa: B023, E731
        reached, steps, summed = refined()[1].tolist()
        others["float32 factor kept, refined"] = bench.seconds(refined, 3)
        facts = {"float32": {"error": reached, "steps": int(steps), "factored the sum": bool(summed)}}
        yield Row(f"{name}, factor kept", error, bench.seconds(cached, 3), 4 * d * d * n, FLOAT64, others, facts)


def low_rank_rows(bench: Bench) -> Iterator[Row]:
    sizes = bench.pick([(4096, 6400, 1600, 1, 64), (4096, 16384, 4096, 1, 256)], [(9, 8, 6, 1, 3)])
    for rows, d_in, d_out, rank, edits in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            y, x = bench.randn(rows, d_out, dtype=dtype), bench.randn(rows, d_in, dtype=dtype, seed=1)
            left = bench.randn(edits, d_out, rank, seed=2)
            right = bench.randn(edits, d_in, rank, seed=3) / d_in**0.5
            index = torch.arange(rows, device=bench.device) % edits

            def plain(into: Tensor) -> None:
                inner = (right[index] * x.float()[:, :, None]).sum(1)  # noqa: B023
                into += (left[index] @ inner[:, :, None])[:, :, 0].to(into.dtype)  # noqa: B023

            name = f"low_rank_rows {rows} x {d_in} to {d_out}, rank {rank}, {edits} edits, {dtype}".replace(
                "torch.", ""
            )
            ours, want = y.clone(), y.clone()
            ops.low_rank_rows(ours, x, left, right, index)
            plain(want)
            error = check(name, deviation(ours, want), ROUNDING[dtype])
            moved = (2 * rows * d_out + rows * d_in) * dtype.itemsize + 4 * edits * rank * (d_in + d_out)
            seconds = bench.seconds(lambda: ops.low_rank_rows(y, x, left, right, index))  # noqa: B023
            yield Row(name, error, seconds, moved, COPY, {"torch": bench.seconds(lambda: plain(y), 3)})  # noqa: B023


CASES = {
    case.__name__: case
    for case in (
        tree_attention,
        restore_rows,
        target_logprob,
        moment_update,
        moment_update_wgmma,
        cholesky,
        low_rank_rows,
    )
}
