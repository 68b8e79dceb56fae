"""Everything that needs a GPU, in two commands without a network.

    python benchmarks/gpu.py check OUT [--conformance DIR] [--minutes 4]
        what is there, the build for this GPU, every test, conformance, one profiled trace
    python benchmarks/gpu.py measure OUT [--module FILE] [--only CASE ...] [--repeat N] [--minutes 8]
        each case in a process of its own, those first that say most; compute-sanitizer last
    ... --dry-run       both at toy size on the CPU: shows that they work

`make gpu` runs both. Between two machines the built module travels: `check` leaves it in OUT, `measure` takes it by
--module, and so does a second `check`, which then builds nothing. OUT holds gpu.json, gpu.md and logs.txt, written anew
after each step and case, whatever ends the process. A test or case that hangs, dies or spoils the device costs itself
alone. No case reports a time whose own check failed.
Exit status: 0 all passed, 1 something failed, 2 there is no GPU.

DIR (default: out/conformance, which git ignores) is a copy of the conformance checks, with check.py in it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_processes import FAILED, NOT_RUN, PASSED, ROOT, Step, collect, run_step, run_tests
from gpu_report import Row, describe, failed_steps, write_report

LEFT_OUT = ("wgmma and TMA for anything but moment_update of 16-bit rows: not written, the sm_80 kernels run there",)
TOOLS = ("nvcc", "cmake", "ninja", "c++")
HEADERS = ("cuda_runtime.h", "Python.h")
# What the package imports, then what building and testing it does.
PACKAGES = ("torch", "transformers", "numpy", "scipy", "filelock", "safetensors", "tqdm", "typer", "rich", "matplotlib")
PACKAGES += ("yaml", "pytest", "hypothesis", "pybind11", "setuptools")
WGMMA_TESTS = "tests-wgmma"
TEST_LIMIT, WGMMA_LIMIT, CASE_LIMIT = 20, 10, 150  # seconds
BEHIND_TESTS, BEHIND_WGMMA = 75, 45  # seconds kept for what comes behind them
# By what the times are worth.
CASES = ("trace", "edits", "moments", "moment_update", "moment_update_wgmma", "tree_attention", "cholesky")
CASES += ("trace_float32", "target_logprob", "restore_rows", "low_rank_rows", "moment_update_wgmma_pairs")
LOOK = """
import importlib, sys
missing = []
for name in sys.argv[1:]:
    try:
        print(name, getattr(importlib.import_module(name), "__version__", ""))
    except Exception as error:
        missing.append(f"{name}: {type(error).__name__}: {error}")
sys.exit("\\n".join(missing) or 0)
"""


def preflight(
    out: Path,
    tools: Sequence[str] = TOOLS,
    headers: Sequence[str] = HEADERS,
    packages: Sequence[str] = PACKAGES,
) -> Iterator[Step]:
    """What the rest needs, each by itself: one that is missing is named, and the others still are looked at."""
    for tool in tools:
        yield run_step(f"tool {tool}", [tool, "--version"], out, 20)
    probe = out / "probe.cpp"
    nvcc = shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parents[1] / "include")] if nvcc else []
    include = [f"-I{folder}" for folder in (*beside, "/usr/local/cuda/include", sysconfig.get_path("include"))]
    for header in headers:
        probe.write_text(f"#include <{header}>\n")
        yield run_step(f"header {Path(header).name}", ["c++", "-fsyntax-only", *include, str(probe)], out, 30)
    yield run_step("packages", [sys.executable, "-c", LOOK, *packages], out, 90)


def check_steps(args: argparse.Namespace, out: Path, logs: Path, until: float) -> Iterator[Step]:
    """Preflight with the build beside it; tests with conformance beside them, those of wgmma behind the others, then a
    profiled trace; nothing behind a build that failed."""
    dry = args.dry_run

    def limit(seconds: float, kept: float = 0) -> float:
        return min(seconds, until - kept - time.monotonic())

    with ThreadPoolExecutor(4) as pool:
        # A barrier of those of wgmma may hang: they come apart.
        wgmma = ["python_tests/ops/test_on_cuda.py", "-k", "wgmma"]
        tests = args.tests or [*files_on_cuda(), "-k", "cuda and not wgmma"]
        found = pool.submit(collected, args.tests_in, tests)
        found_wgmma = None if dry else pool.submit(collected, ROOT, wgmma)
        build = None if dry or args.module else pool.submit(run_build, logs, limit(150))
        yield from preflight(logs, *((("c++",), ("vector",)) if dry else (TOOLS, HEADERS)))
        if not dry:
            yield run_step("driver", ["nvidia-smi"], logs, limit(30))
        if build is not None:
            yield build.result()
            if build.result().status != PASSED:
                return
            for module in ROOT.glob("knowedit_ext/_C*.so"):
                shutil.copy(module, out)
        conformance = pool.submit(run_conformance, args, logs, limit(150, BEHIND_WGMMA))
        yield test_step("tests", found.result(), args.tests_in, logs, until - BEHIND_TESTS, TEST_LIMIT, args.workers)
        if found_wgmma is not None:
            yield test_step(WGMMA_TESTS, found_wgmma.result(), ROOT, logs, until - BEHIND_WGMMA, WGMMA_LIMIT, 4)
        yield conformance.result()
    profile = [sys.executable, str(ROOT / "benchmarks" / "gpu_profile.py"), *(["--toy"] if dry else [])]
    yield run_step("profile", profile, logs, limit(60))


def run_build(logs: Path, limit: float) -> Step:
    major, minor = torch.cuda.get_device_capability()
    archs = {"KNOWEDIT_CUDA": "ON", "KNOWEDIT_CUDA_ARCHS": f"{major}{minor}{'a' if major >= 9 else ''}-real"}
    return run_step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], logs, limit, **archs)


def run_conformance(args: argparse.Namespace, logs: Path, limit: float) -> Step:
    check = args.conformance / "check.py"
    if not check.is_file():
        return Step("conformance", NOT_RUN, detail=f"no check.py in {args.conformance}: copy the checks there")
    return run_step(
        "conformance", [sys.executable, str(check), "--device", "cpu" if args.dry_run else "cuda"], logs, limit
    )


def files_on_cuda() -> list[str]:
    """The files with tests that may run on CUDA: pytest reads no others, which takes long."""
    told = re.compile(r"cuda|def test_\w+\([^)]*\b(device|body)\b")
    files = sorted((ROOT / "python_tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if told.search(file.read_text())]


def collected(cwd: Path, arguments: Sequence[str]) -> tuple[list[str], list[str]] | RuntimeError:
    try:
        tests, broken = collect(cwd, *arguments)
    except RuntimeError as error:
        return error
    return sorted(tests, key=lambda test: "wgmma_pairs" in test), broken  # what no default uses comes last


def test_step(
    name: str,
    found: tuple[list[str], list[str]] | RuntimeError,
    cwd: Path,
    logs: Path,
    until: float,
    limit: float,
    workers: int,
) -> Step:
    """Tests by `gpu_processes.run_tests`; its detail names the failing ones, the shortest name first, and its log says
    all that they said."""
    if isinstance(found, RuntimeError):
        return Step(name, FAILED, detail=str(found))
    begun, (tests, broken) = time.monotonic(), found
    folder = logs / name
    folder.mkdir(exist_ok=True)
    done = run_tests(tests, cwd, folder, limit, until, workers)
    failed = sorted(done.failed.items(), key=lambda item: len(item[0]))
    whole = [f"==== {test}\n{why}" for test, why in failed]
    whole += [f"==== what {log.stem} said\n{log.read_text(errors='replace')}" for log in sorted(folder.glob("*.log"))]
    (logs / f"{name}.log").write_text("\n".join(whole))
    reasons = sorted(set(done.skipped.values()))
    lines = [f"cannot be read: {file}" for file in broken]
    lines += [f"{test}: {in_short(why)}" for test, why in failed]
    lines += [f"{list(done.skipped.values()).count(why)} skipped: {why}" for why in reasons]
    lines += [f"{len(done.left)} of {len(tests)} not run: no time left"] if done.left else []
    ran = len(tests) - len(done.left) - len(done.skipped)
    lines.append(f"{len(failed)} of {ran} failed" if failed else f"all {ran} passed" if ran else "none ran")
    status = FAILED if failed or broken else NOT_RUN if done.left or not ran else PASSED
    print(f"-- {name}: {status}\n" + "\n".join(lines), flush=True)
    return Step(name, status, time.monotonic() - begun, "\n".join(lines))


def in_short(why: str) -> str:
    """The line that says what was wrong."""
    lines = [line.strip() for line in why.splitlines() if line.strip()]
    said = [line.removeprefix("E ").strip() for line in lines if line.startswith("E ")]
    return (said or lines or [""])[0][:300]


def measure_cases(
    args: argparse.Namespace, logs: Path, until: float, report: dict[str, Any], save: Callable[[], None]
) -> None:
    """Each case in a process of its own, whose rows so far are kept whatever ends it."""
    for name in ("ceilings", *args.only):
        left = until - time.monotonic()
        if left < 5:
            report["not_run"][name] = "no time left"
            continue
        rows = logs / f"case-{name}.json"
        case = [str(ROOT / "benchmarks" / "gpu_case.py"), str(rows), name, "--repeat", str(args.repeat)]
        step = run_step(
            f"case {name}", [sys.executable, *case, *["--dry-run"] * args.dry_run], logs, min(CASE_LIMIT, left)
        )
        found = json.loads(rows.read_text()) if rows.exists() else {}
        report["ceilings"] |= found.get("ceilings", {})
        report["cases"] += [Row(**row).as_dict(report["ceilings"]) for row in found.get("rows", [])]
        report["failed"] |= found.get("failed", {})
        report["not_run"] |= found.get("not_run", {})
        if step.status == FAILED and name not in report["failed"]:
            report["failed"][name] = step.detail.splitlines()[0] if step.detail else "it failed"
        save()


def sanitizers(logs: Path, until: float) -> Iterator[Step]:
    """memcheck and racecheck, in what time is left: they are slow."""
    for tool in ("memcheck", "racecheck"):
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            yield Step(tool, NOT_RUN, detail="compute-sanitizer is not installed")
            continue
        tests = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "python_tests/ops/test_on_cuda.py", "-k", "sanitized"]
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, *tests]
        # Without its pool, torch's neighbours in memory do not hide an access outside.
        yield run_step(tool, command, logs, min(120, until - time.monotonic()), PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def commit() -> str:
    """Of the tree, or $GPU_COMMIT where the tree is a copy without its history."""
    known = os.environ.get("GPU_COMMIT", "unknown")
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git here
        return known
    return done.stdout.strip() or known


def extend_path() -> None:
    """CMake and ninja may be this Python's own; nvcc and compute-sanitizer are often beside PATH."""
    more = [str(Path(sys.prefix) / "bin"), "/usr/local/cuda/bin"]
    os.environ["PATH"] = os.pathsep.join([*filter(None, [os.environ.get("PATH")]), *more])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=("check", "measure"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--minutes", type=float, help="nothing begins after so many (4 for check, 8 for measure)")
    parser.add_argument("--conformance", type=Path, default=ROOT / "out" / "conformance")
    parser.add_argument("--tests", nargs="+", help="what pytest is given (default: the tests on CUDA)")
    parser.add_argument("--tests-in", type=Path, default=ROOT, help="where pytest runs")
    parser.add_argument("--workers", type=int, default=8, help="processes that test at the same time")
    parser.add_argument("--module", type=Path, help="the native module that `check` built")
    parser.add_argument("--repeat", type=int, default=7, help="times a call is timed")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    return parser.parse_args()


def main() -> int:
    start, args = time.monotonic(), arguments()
    if not args.dry_run and not torch.cuda.is_available():
        built = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
        print(f"gpu.py: {built}, sees no CUDA device here; --dry-run shows all at toy size on the CPU", file=sys.stderr)
        return 2
    extend_path()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    until = start + 60 * (args.minutes or {"check": 4, "measure": 8}[args.call])
    report: dict[str, Any] = {
        "call": args.call,
        "machine": "the CPU" if args.dry_run else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit(),
        "dry_run": args.dry_run,
        "steps": [],
        "ceilings": {},
        "cases": [],
        "failed": {},
        "not_run": {},
        "left_out": list(LEFT_OUT),
    }
    if args.module is not None and args.module.resolve().parent != ROOT / "knowedit_ext":
        shutil.copy(args.module, ROOT / "knowedit_ext" / args.module.name)
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)

        def save() -> None:
            report["minutes"] = (time.monotonic() - start) / 60
            write_report(out, logs, report)

        def record(steps: Iterable[Step]) -> None:
            for step in steps:
                report["steps"].append(asdict(step))
                save()

        if args.call == "check":
            record(check_steps(args, out, logs, until))
        else:
            measure_cases(args, logs, until, report, save)
            if not args.dry_run:
                record(sanitizers(logs, until))
        save()
    print(describe(report))
    return int(bool(failed_steps(report) or report["failed"]))


if __name__ == "__main__":
    sys.exit(main())
