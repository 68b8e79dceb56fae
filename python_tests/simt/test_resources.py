"""What nvcc says of the kernels: no warning, no spill, for the GPUs that the wheel has code for; with
KNOWEDIT_ALL_GPUS=1, as in CI, for newer ones too."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from simt import harness

ARCHITECTURES = ["sm_80", "sm_90a"] + ["sm_100", "sm_120"] * (os.environ.get("KNOWEDIT_ALL_GPUS") == "1")
# Two blocks a multiprocessor are worth the bytes that float32 spills here.
ACCEPTED = {("target_logprob", "sm_100"): 44, ("cholesky", "sm_100"): 24}
FLAGS = ["-std=c++17", "-cubin", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra", "-Werror"]


@functools.cache
def nvcc() -> str:
    """nvcc; skips the test where there is none."""
    compiler = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if compiler is None:
        pytest.skip("no nvcc: what the kernels need of a GPU is not looked at")
    return compiler


@functools.cache
def known() -> set[str]:
    return set(subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True).stdout.split())


def spills(report: str) -> dict[str, int]:
    """Bytes that each kernel in ptxas's report stores and loads for want of registers."""
    kernel = r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    return {name: int(stores) + int(loads) for name, stores, loads in re.findall(kernel, report)}


def compiled(kernel: str, architecture: str, folder: Path) -> str:
    """What nvcc says, having compiled without a warning."""
    source = harness.CSRC / "cuda" / f"{kernel}.cu"
    command = [nvcc(), f"-arch={architecture}", f"-I{harness.CSRC / 'include'}", *FLAGS, "all-warnings"]
    done = subprocess.run(
        [*command, str(source), "-o", str(folder / "kernel.cubin")], stdout=-1, stderr=subprocess.STDOUT, text=True
    )
    log = done.stdout
    assert done.returncode == 0 and "warning" not in log and "Performance Loss" not in log, log[-8000:]
    return log


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", harness.kernels())
def test_no_warnings_and_no_spills(kernel, architecture, tmp_path):
    if architecture.rstrip("a") not in known():
        pytest.skip(f"this nvcc does not know {architecture}")
    spilled = spills(compiled(kernel, architecture, tmp_path))
    assert spilled, "ptxas named no kernel"
    assert sum(spilled.values()) <= ACCEPTED.get((kernel, architecture), 0), spilled


def test_spills_are_found():
    report = "ptxas info    : Function properties for a_kernel\n    8 bytes stack frame, 4 bytes spill stores, "
    assert spills(report + "12 bytes spill loads") == {"a_kernel": 16}
