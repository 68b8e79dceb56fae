"""What the cases of `gpu.py` share: timing on the device, the ceilings of this machine, rows of the report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_report import Row
from torch import Tensor

from knowedit_ext.model.precision import float32_products

COPY, BF16, TF32, FLOAT32, FLOAT64 = "copy", "bfloat16 matmul", "tf32 matmul", "float32 matmul", "float64 matmul"


class CheckFailed(RuntimeError):
    """A result that is not what it should be: no time is reported for it."""


Rows = Iterator[Callable[[], Row]]  # of a case: each made by itself, so that one that fails leaves the others


@dataclass(frozen=True)
class Bench:
    """Where cases run, and at which size: `toy` is for showing that the cases work."""

    device: str
    toy: bool
    repeat: int = 7

    def pick(self, real: Any, toy: Any) -> Any:
        return toy if self.toy else real

    def seconds(self, call: Callable[[], Any], repeat: int = 7) -> float:
        """Median time of a call, after one that is not counted."""
        call()
        return statistics.median(self.seconds_once(call) for _ in range(1 if self.toy else min(repeat, self.repeat)))

    def seconds_once(self, call: Callable[[], Any]) -> float:
        """Time of one call, nothing warm."""
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        draw = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=draw, device=self.device, dtype=torch.float32).to(dtype)


def check(name: str, error: float, allowed: float) -> float:
    """The error, where it is allowed; NaN never is."""
    if not error <= allowed:
        raise CheckFailed(f"{name}: error {error:.2e}, allowed {allowed:.0e}")
    return error


def deviation(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|."""
    truth = truth.double()
    return float((value.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def measure_ceilings(bench: Bench) -> dict[str, float]:
    """flop/s of large square products by dtype, bytes/s (read + written) of a large copy."""

    def product(dtype: torch.dtype, size: int) -> float:
        size = bench.pick(size, 64)
        a, b = bench.randn(size, size, dtype=dtype, seed=1), bench.randn(size, size, dtype=dtype, seed=2)
        return 2 * size**3 / bench.seconds(lambda: a @ b)

    ceilings = {BF16: product(torch.bfloat16, 8192)}
    with float32_products("tf32"):
        ceilings[TF32] = product(torch.float32, 8192)
    ceilings[FLOAT32] = product(torch.float32, 8192)
    ceilings[FLOAT64] = product(torch.float64, 8192)
    source = torch.empty(bench.pick(1 << 32, 1 << 16), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    ceilings[COPY] = 2 * source.numel() / bench.seconds(lambda: target.copy_(source))
    return ceilings
