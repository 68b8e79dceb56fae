"""`benchmarks/gpu.py` without a GPU: it says so, both its calls work at toy size, and what fails costs itself alone."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
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
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


@pytest.fixture
def gpu_case(gpu):
    """What runs a case; not the cases, whose modules have names of test packages."""
    import gpu_case

    return gpu_case


def test_every_case_has_its_place_in_the_order():
    names = "import gpu, gpu_kernels as k, gpu_models as m; print(*sorted(k.CASES | m.CASES), *sorted(gpu.CASES))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", names], capture_output=True, text=True, env=env)
    cases = done.stdout.split()
    half = len(cases) // 2
    assert half and cases[:half] == cases[half:], done.stdout + done.stderr


def run_dry(tmp_path: Path, *cases: str) -> dict:
    done = script("measure", str(tmp_path), "--dry-run", "--only", *cases)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["dry_run"] and not report["failed"] and not report["not_run"] and not report["steps"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "gpu.md", "logs.txt"]
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
    report = run_dry(tmp_path, "trace", "trace_float32", "edits")
    assert len(report["cases"]) == 2 * 3 + 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_gpu_is_said(tmp_path):
    done = script("check", str(tmp_path / "out"))
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_failed_check_reports_no_time(gpu_case):
    measure = sys.modules["gpu_measure"]
    timed = []

    def wrong(bench):
        error = measure.check("wrong", float("nan"), 1.0)
        timed.append(bench)
        yield measure.Row("wrong", error, 1.0)

    def right(bench):
        yield measure.Row("right", measure.check("right", 0.5, 1.0), 2.0, 8.0, "copy", {"torch": 3.0})

    bench = measure.Bench("cpu", True)
    rows, failed, not_run = gpu_case.run_cases(bench, {"wrong": wrong, "right": right}, float("inf"))
    assert not timed and "error nan" in failed["wrong"] and not not_run
    (row,) = rows
    assert row.as_dict({"copy": 8.0})["share"] == 0.5 and row.as_dict({"copy": 8.0})["ratios"] == {"torch": 1.5}
    rows, failed, not_run = gpu_case.run_cases(bench, {"right": right}, 0.0)
    assert not rows and not_run == {"right": "no time left"}


def test_a_step_that_fails_or_hangs_is_told_with_its_last_words(gpu, tmp_path):
    failing = gpu.run_step("broken", [sys.executable, "-c", "print('words'); raise SystemExit(3)"], tmp_path, 60)
    assert failing.status == gpu.FAILED and failing.detail.startswith("3:") and "words" in failing.detail
    fine = gpu.run_step("fine", [sys.executable, "-c", "import knowedit_ext"], tmp_path, 60)
    assert fine.status == gpu.PASSED and not fine.detail


def test_what_a_step_started_ends_with_it(gpu, tmp_path):
    """A child that would go on holding the device."""
    child = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    )
    hang = child + f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(600)"
    hanging = gpu.run_step("hanging", [sys.executable, "-c", hang], tmp_path, 3)
    assert hanging.status == gpu.FAILED and "no end within 3 s" in hanging.detail
    pid = int((tmp_path / "pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


PLANTED = """
import ctypes, os, time
import pytest

LOST = False
print("KNOWS")

@pytest.mark.parametrize("n", range(3))
def test_fine_before(n): pass

def test_hangs(): time.sleep(600)

def test_between(): assert not LOST

def test_is_wrong(): assert 1 == 2

def test_skipped(): pytest.skip("no such GPU")

def test_spoils_the_device():
    global LOST
    LOST = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_behind_it(): assert not LOST, "in a process whose device is lost"

def test_dies(): os.abort()

def test_last(): assert not LOST
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_test_that_hangs_dies_or_spoils_the_device_costs_itself_alone(gpu, tmp_path, workers):
    processes = sys.modules["gpu_processes"]
    (tmp_path / "test_planted.py").write_text(PLANTED)
    tests, broken = processes.collect(tmp_path, "test_planted.py")
    assert len(tests) == 11 and not broken
    done = processes.run_tests(tests, tmp_path, tmp_path, 3, time.monotonic() + 300, workers)
    why = {test.rpartition("::")[2]: reason for test, reason in done.failed.items()}
    assert not done.left and set(why) == {"test_hangs", "test_is_wrong", "test_spoils_the_device", "test_dies"}
    assert "no end within 3 s" in why["test_hangs"] and "in test_hangs" in why["test_hangs"]  # and where
    assert "illegal memory access" in why["test_spoils_the_device"] and "assert 1 == 2" in why["test_is_wrong"]
    assert "the process ended with -6" in why["test_dies"]
    assert list(done.skipped.values()) == ["Skipped: no such GPU"]
    started = sum(log.read_text().count("KNOWS") for log in tmp_path.glob("tests-*.log"))
    assert started <= 3 + workers  # what is merely wrong needs no new process


def test_a_process_that_cannot_begin_is_told_and_not_tried_for_ever(gpu, tmp_path):
    processes = sys.modules["gpu_processes"]
    (tmp_path / "test_planted.py").write_text("import os\nos.abort()\n")
    tests = [f"test_planted.py::test_{n}" for n in range(5)]
    done = processes.run_tests(tests, tmp_path, tmp_path, 3, time.monotonic() + 300)
    assert set(done.failed) == set(tests) and "ended with -6, before it began" in done.failed[tests[0]]


def test_tests_that_there_is_no_time_for_are_counted(gpu, tmp_path):
    processes = sys.modules["gpu_processes"]
    (tmp_path / "test_planted.py").write_text(PLANTED)
    (tmp_path / "test_broken.py").write_text("import no_such_package\n")
    tests, broken = processes.collect(tmp_path, "test_planted.py", "test_broken.py")
    assert len(tests) == 11 and broken and broken[0].startswith("test_broken.py")
    assert processes.run_tests(tests, tmp_path, tmp_path, 3, time.monotonic() - 1).left == tests
    step = gpu.test_step("tests", (tests[:3], broken), tmp_path, tmp_path, time.monotonic() + 300, 3, 1)
    assert step.status == gpu.FAILED and "test_broken.py" in step.detail and step.detail.endswith("all 3 passed")
    skipped = [test for test in tests if test.endswith("skipped")]
    step = gpu.test_step("tests", (skipped, []), tmp_path, tmp_path, time.monotonic() + 300, 3, 1)
    assert step.status == gpu.NOT_RUN and step.detail == "1 skipped: Skipped: no such GPU\nnone ran"
    with pytest.raises(RuntimeError, match="finds no test"):
        processes.collect(tmp_path, "nowhere.py")


def test_a_missing_header_is_named_and_the_rest_looked_at(gpu, tmp_path):
    tools, headers, packages = ("c++", "no_such_tool"), ("vector", "no_such_header.h", "string"), ("torch", "pytest")
    steps = {step.name: step for step in gpu.preflight(tmp_path, tools, headers, packages)}
    assert "no_such_tool does not start" in steps["tool no_such_tool"].detail
    assert steps["header no_such_header.h"].status == gpu.FAILED
    assert "no_such_header.h" in steps["header no_such_header.h"].detail
    assert {name for name, step in steps.items() if step.status == gpu.PASSED} == {
        "tool c++",
        "header vector",
        "header string",
        "packages",
    }
    (packages,) = (step for step in gpu.preflight(tmp_path, (), (), ("no_such_one", "torch", "no_such_other")))
    assert packages.status == gpu.FAILED and "no_such_one" in packages.detail and "no_such_other" in packages.detail


def test_dry_run_of_the_check_with_planted_failures(tmp_path):
    """The rest of the call comes back: conformance is looked for, the profile is there, what failed is named."""
    (tmp_path / "test_planted.py").write_text(PLANTED.replace("time.sleep(600)", "os.abort()"))
    out, planted = tmp_path / "out", ["--tests-in", str(tmp_path), "--tests", "test_planted.py"]
    done = script("check", str(out), "--dry-run", "--workers", "2", "--conformance", str(tmp_path), *planted)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((out / "gpu.json").read_text())
    outcome = {step["name"]: step["status"] for step in report["steps"]}
    assert outcome["tests"] == "FAILED" and outcome["conformance"] == "not run" and outcome["profile"] == "passed"
    (tested,) = (step for step in report["steps"] if step["name"] == "tests")
    assert "4 of 10 failed" in tested["detail"] and "test_is_wrong: assert 1 == 2" in tested["detail"]
    assert {file.name for file in out.iterdir()} == {"gpu.json", "gpu.md", "logs.txt"}
    logs = (out / "logs.txt").read_text()
    assert "==== profile" in logs and "an illegal memory access was encountered" in logs
    assert done.stdout.rstrip().splitlines()[-1].startswith("Left out:")  # the table is last


def test_a_case_that_dies_leaves_the_others(gpu, tmp_path, monkeypatch):
    """`measure` with a case whose process ends at once, one that hangs, and one that is measured."""
    real = gpu.run_step

    def run(name, command, out, limit, **env):
        if name == "case restore_rows":
            command = [sys.executable, "-c", "import os; os.abort()"]
        if name == "case cholesky":
            command, limit = [sys.executable, "-c", "import time; time.sleep(600)"], 2
        return real(name, command, out, limit, **env)

    monkeypatch.setattr(gpu, "run_step", run)
    report = {"ceilings": {}, "cases": [], "failed": {}, "not_run": {}}
    args = argparse.Namespace(only=["restore_rows", "cholesky", "low_rank_rows"], dry_run=True, repeat=1)
    gpu.measure_cases(args, tmp_path, time.monotonic() + 600, report, lambda: None)
    assert set(report["failed"]) == {"restore_rows", "cholesky"} and not report["not_run"]
    assert "-6" in report["failed"]["restore_rows"] and "no end within 2 s" in report["failed"]["cholesky"]
    assert {case["case"].split()[0] for case in report["cases"]} == {"low_rank_rows"} and len(report["ceilings"]) == 5
