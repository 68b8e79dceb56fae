"""`benchmarks/gpu.py` without a GPU: it says so, its cases work at toy size, no time outlives a failed check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
QUICK = ["tree_attention", "restore_rows", "target_logprob", "moment_update", "cholesky", "low_rank_rows", "moments"]


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}  # it imports its neighbours
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module. Its cases are imported by `main` only: their names are those of test packages too."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def run_dry(tmp_path: Path, *cases: str) -> dict:
    done = script(str(tmp_path), "--dry-run", "--only", *cases)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["dry_run"] and not report["failed"] and not report["not_run"] and not report["steps"]
    assert "the times mean nothing" in (tmp_path / "gpu.md").read_text()
    for case in report["cases"]:
        assert case["seconds"] > 0 and case["error"] < 0.1
        assert not case["ceiling"] or case["share"] > 0
    return report


def test_dry_run_of_the_kernels(tmp_path):
    report = run_dry(tmp_path, *QUICK)
    names = {case["case"].split()[0] for case in report["cases"]}
    assert {"tree_attention", "target_logprob", "moment_update", "cholesky_solve_update"} <= names
    assert len(report["ceilings"]) == 5


@pytest.mark.slow
def test_dry_run_of_tracing_and_editing(tmp_path):
    report = run_dry(tmp_path, "trace", "edits")
    assert len(report["cases"]) == 2 * 3 + 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_gpu_is_said(tmp_path):
    done = script(str(tmp_path / "out"))
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_failed_check_reports_no_time(gpu):
    measure = sys.modules["gpu_measure"]
    timed = []

    def wrong(bench):
        error = measure.check("wrong", float("nan"), 1.0)
        timed.append(bench)
        yield measure.Row("wrong", error, 1.0)

    def right(bench):
        yield measure.Row("right", measure.check("right", 0.5, 1.0), 2.0, 8.0, "copy", {"torch": 3.0})

    bench = measure.Bench("cpu", True)
    rows, failed, not_run = gpu.run_cases(bench, {"wrong": wrong, "right": right}, float("inf"))
    assert not timed and "error nan" in failed["wrong"] and not not_run
    (row,) = rows
    assert row.as_dict({"copy": 8.0})["share"] == 0.5 and row.as_dict({"copy": 8.0})["ratios"] == {"torch": 1.5}
    rows, failed, not_run = gpu.run_cases(bench, {"right": right}, 0.0)
    assert not rows and not_run == {"right": "no time left"}


def test_a_step_that_fails_or_hangs_is_told_with_its_last_words(gpu, tmp_path):
    failing = gpu.run_step("broken", [sys.executable, "-c", "print('words'); raise SystemExit(3)"], tmp_path, 60)
    assert failing.status == gpu.FAILED and failing.detail.startswith("3:") and "words" in failing.detail
    hanging = gpu.run_step("hanging", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, 0.5)
    assert hanging.status == gpu.FAILED and "no end within" in hanging.detail
    fine = gpu.run_step("fine", [sys.executable, "-c", "import knowedit_ext"], tmp_path, 60)
    assert fine.status == gpu.PASSED and not fine.detail
