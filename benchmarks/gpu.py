"""Everything that needs a GPU, in two commands without a network.

    python benchmarks/gpu.py check OUT [--conformance DIR] [--minutes 4]
        what is there, the build for this GPU, every test, conformance, one profiled trace
    python benchmarks/gpu.py measure OUT [--module FILE] [--only CASE ...] [--repeat N] [--minutes 8]
        each case in a process of its own, those first that say most; compute-sanitizer last
    ... --dry-run       both at toy size on the CPU: shows that they work

`make gpu` runs both. Between two machines the built module travels: `check` leaves it in OUT, `measure` takes it by
--module. OUT holds gpu.json, gpu.md and logs.txt, written anew after each step and row, whatever ends the process. A
test or case that hangs, dies or spoils the device costs itself alone. No case reports a time whose own check failed.
Exit status: 0 all passed, 1 something failed, 2 there is no GPU.

DIR (default: out/conformance, which git ignores) is a copy of the conformance checks, with check.py in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_measure import Bench, CheckFailed, Row, measure_ceilings
from gpu_processes import FAILED, NOT_RUN, PASSED, ROOT, Step, collect, run_step, run_tests

Case = Callable[[Bench], Iterator[Row | Callable[[], Row]]]
LEFT_OUT = ("wgmma and TMA for anything but moment_update of 16-bit rows: not written, the sm_80 kernels run there",)
HEADERS = ("cuda_runtime.h", "Python.h")
PACKAGES = ("torch", "transformers", "safetensors", "scipy", "pytest", "pybind11")
WGMMA_TESTS = "tests-wgmma"
TEST_LIMIT, CASE_LIMIT = 20, 150  # seconds
# By what the times are worth.
ORDER = ("trace", "edits", "moments", "moment_update", "moment_update_wgmma", "tree_attention", "cholesky")


def all_cases() -> dict[str, Case]:
    import gpu_kernels
    import gpu_models

    known = gpu_kernels.CASES | gpu_models.CASES
    return {name: known[name] for name in (*ORDER, *(name for name in known if name not in ORDER))}


def preflight(out: Path, headers: Sequence[str] = HEADERS, packages: Sequence[str] = PACKAGES) -> Iterator[Step]:
    """What the rest needs, each by itself: one that is missing is named, and the others still are looked at."""
    probe = out / "probe.cpp"
    include = [f"-I{folder}" for folder in ("/usr/local/cuda/include", sysconfig.get_path("include"))]
    for header in headers:
        probe.write_text(f"#include <{header}>\n")
        yield run_step(f"header {Path(header).name}", ["c++", "-fsyntax-only", *include, str(probe)], out, 30)
    probe.unlink(missing_ok=True)
    imports = "; ".join(f"import {name}, sys; print({name!r}, getattr({name}, '__version__', ''))" for name in packages)
    yield run_step("packages", [sys.executable, "-c", imports], out, 60)


def check_steps(args: argparse.Namespace, out: Path, until: float) -> Iterator[Step]:
    """Preflight, build, tests, conformance, a profiled trace; nothing after a build that failed."""

    def limit(seconds: float) -> float:
        return min(seconds, until - time.monotonic())

    yield from preflight(out, ("vector",) if args.dry_run else HEADERS)
    if not args.dry_run:
        yield run_step("driver", ["nvidia-smi"], out, limit(30))
        major, minor = torch.cuda.get_device_capability()
        archs = {"KNOWEDIT_CUDA": "ON", "KNOWEDIT_CUDA_ARCHS": f"{major}{minor}{'a' if major >= 9 else ''}-real"}
        build = run_step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], out, limit(150), **archs)
        yield build
        if build.status != PASSED:
            return
        for module in ROOT.glob("knowedit_ext/_C*.so"):
            shutil.copy(module, out)
    tests = args.tests or ["python_tests", "-k", "cuda and not wgmma"]
    yield test_step("tests", tests, args.tests_in, out, until - 60, args.workers)
    if not args.dry_run:  # apart: a barrier of theirs may hang
        tests = ["python_tests/ops/test_on_cuda.py", "-k", "wgmma"]
        yield test_step(WGMMA_TESTS, tests, ROOT, out, limit(40) + time.monotonic(), 2)
    if (args.conformance / "check.py").is_file():
        command = [sys.executable, str(args.conformance / "check.py"), "--device", "cpu" if args.dry_run else "cuda"]
        yield run_step("conformance", command, out, limit(120))
    else:
        yield Step("conformance", NOT_RUN, detail=f"no check.py in {args.conformance}: copy the checks there")
    profile = [sys.executable, str(ROOT / "benchmarks" / "gpu_profile.py"), *(["--toy"] if args.dry_run else [])]
    yield run_step("profile", profile, out, limit(60))


def test_step(name: str, arguments: Sequence[str], cwd: Path, out: Path, until: float, workers: int) -> Step:
    """Tests by `gpu_processes.run_tests`; its detail names the failing ones, the shortest first."""
    begun = time.monotonic()
    try:
        tests = collect(cwd, *arguments)
    except RuntimeError as error:
        return Step(name, FAILED, detail=str(error))
    failed, left = run_tests(tests, cwd, out, TEST_LIMIT, until, workers)
    lines = [f"{test}: {why}" for test, why in sorted(failed.items(), key=lambda item: len(item[0]))]
    lines += [f"{len(left)} of {len(tests)} not run: no time left"] if left else []
    status = FAILED if failed else NOT_RUN if left else PASSED
    detail = "\n".join([*lines, f"{len(failed)} of {len(tests)} failed"] if lines else [])
    print(f"-- {name}: {status}\n{detail}", flush=True)
    return Step(name, status, time.monotonic() - begun, detail)


def measure_cases(
    args: argparse.Namespace, out: Path, until: float, report: dict[str, Any], save: Callable[[], None]
) -> None:
    """Each case in a process of its own, whose rows so far are kept whatever ends it."""
    for name in ("ceilings", *args.only):
        left = until - time.monotonic()
        if left < 5:
            report["not_run"][name] = "no time left"
            continue
        rows = out / f"case-{name}.json"
        command = [sys.executable, __file__, "case", str(out), "--case", name, "--repeat", str(args.repeat)]
        step = run_step(
            f"case {name}", [*command, *(["--dry-run"] if args.dry_run else [])], out, min(CASE_LIMIT, left)
        )
        found = json.loads(rows.read_text()) if rows.exists() else {}
        rows.unlink(missing_ok=True)
        report["ceilings"] |= found.get("ceilings", {})
        report["cases"] += [Row(**row).as_dict(report["ceilings"]) for row in found.get("rows", [])]
        report["failed"] |= found.get("failed", {})
        report["not_run"] |= found.get("not_run", {})
        if step.status == FAILED and name not in report["failed"]:
            report["failed"][name] = step.detail.splitlines()[0] if step.detail else "it failed"
        save()


def one_case(args: argparse.Namespace, out: Path) -> int:
    """A case, in the process that `measure_cases` started for it."""
    bench = Bench("cpu" if args.dry_run else "cuda", args.dry_run, args.repeat)
    target = out / f"case-{args.case}.json"
    if args.case == "ceilings":
        target.write_text(json.dumps({"ceilings": measure_ceilings(bench)}))
        return 0

    def save(rows: list[Row], failed: dict[str, str], not_run: dict[str, str]) -> None:
        kept = {"rows": [asdict(row) for row in rows], "failed": failed, "not_run": not_run}
        target.with_suffix(".new").write_text(json.dumps(kept))
        target.with_suffix(".new").replace(target)

    run_cases(bench, {args.case: all_cases()[args.case]}, float("inf"), save)
    return 0


def sanitizers(out: Path, until: float) -> Iterator[Step]:
    """memcheck and racecheck, in what time is left: they are slow."""
    for tool in ("memcheck", "racecheck"):
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            yield Step(tool, NOT_RUN, detail="compute-sanitizer is not installed")
            continue
        tests = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "python_tests/ops/test_on_cuda.py", "-k", "sanitized"]
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, *tests]
        # Without its pool, torch's neighbours in memory do not hide an access outside.
        yield run_step(tool, command, out, min(120, until - time.monotonic()), PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def device_answers(bench: Bench) -> bool:
    """False after an error that CUDA does not recover from in this process; frees the memory of what is done."""
    try:
        if bench.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def run_cases(
    bench: Bench, cases: dict[str, Case], deadline: float, save: Callable[..., None] = lambda *tables: None
) -> tuple[list[Row], dict[str, str], dict[str, str]]:
    """Rows; what failed and what there was no time for, by case; `save` is called with all three after each row."""
    rows: list[Row] = []
    failed: dict[str, str] = {}
    not_run: dict[str, str] = {}
    answers = True
    for name, case in cases.items():
        if not answers or time.monotonic() > deadline:
            not_run[name] = "no time left" if answers else "the device answers no more after what failed before"
            continue
        torch.manual_seed(0)
        pending = case(bench)
        while answers:
            failure = ""
            try:
                row = next(pending, None)  # a case that raised has ended; one that yielded a call goes on behind it
                row = row() if callable(row) else row
                if row is None:
                    break
                print(f"{row.name}: {row.seconds:.3g} s, error {row.error:.1e}", flush=True)
                rows.append(row)
            except CheckFailed as error:
                failure = str(error)
            except torch.OutOfMemoryError:
                not_run[f"{name}, part of it"] = "out of memory"
            except Exception as error:  # one broken case must not take the others' numbers along
                failure = f"{type(error).__name__}: {error}"
            if failure:
                failed[name] = "; ".join(filter(None, [failed.get(name), failure]))
                print(f"{name}: FAILED, {failure}", flush=True)
            answers = device_answers(bench)
            if answers and time.monotonic() > deadline:
                not_run[f"{name}, after '{rows[-1].name if rows else name}'"] = "no time left"
                break
            save(rows, failed, not_run)
    save(rows, failed, not_run)
    return rows, failed, not_run


def failed_steps(report: dict[str, Any]) -> list[str]:
    return [step["name"] for step in report["steps"] if step["status"] == FAILED]


def describe(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"{report['machine']}, torch {report['torch']}, commit {report['commit']}", ""]
    if report["dry_run"]:
        lines += ["A dry run at toy size on the CPU: the times mean nothing.", ""]
    lines += ["| step | outcome | s |", "|---|---|--:|"]
    lines += [
        f"| {s['name']} | {s['status']} {s['detail'].splitlines()[-1] if s['detail'] else ''} | {s['seconds']:.0f} |"
        for s in report["steps"]
    ]
    lines += ["", "| ceiling | T/s |", "|---|--:|"]
    lines += [f"| {name} | {rate / 1e12:.3g} |" for name, rate in report["ceilings"].items()]
    lines += ["", "| case | ms | T(flop or byte)/s | of ceiling | beside | error |", "|---|--:|--:|--:|---|--:|"]
    for case in report["cases"]:
        beside = [f"{name} {ratio:.2f}x" for name, ratio in case["ratios"].items()]
        beside += [f"{k.replace('_', ' ')} {v:.3g}" for k, v in case.items() if k.startswith("minutes")]
        rate, share = ("", "")
        if case["share"] is not None:
            rate, share = f"{case['rate'] / 1e12:.3g}", f"{case['share']:.0%} ({case['ceiling']})"
        cells = (case["case"], f"{1e3 * case['seconds']:.3g}", rate, share, ", ".join(beside), f"{case['error']:.0e}")
        lines.append(f"| {' | '.join(cells)} |")
    for title in ("failed", "not_run"):
        lines += ["", *(f"{title.replace('_', ' ').upper()}: {name}: {why}" for name, why in report[title].items())]
    lines += ["", *(f"Left out: {what}." for what in report["left_out"])]
    for s in report["steps"]:
        if s["status"] == FAILED:
            lines += ["", f"{s['name']} ended with", "", "```", s["detail"], "```"]
    return "\n".join(lines) + "\n"


def write_report(out: Path, report: dict[str, Any]) -> None:
    """With all logs in one file: few files come back from where a GPU is lent."""
    (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu.md").write_text(describe(report))
    logs = sorted(out.glob("*.log"), key=lambda log: log.stat().st_mtime)
    (out / "logs.txt").write_text("".join(f"==== {log.stem}\n{log.read_text(errors='replace')}\n" for log in logs))


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


def arguments(cases: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=("check", "measure", "case"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--minutes", type=float, help="nothing begins after so many (4 for check, 8 for measure)")
    parser.add_argument("--conformance", type=Path, default=ROOT / "out" / "conformance")
    parser.add_argument("--tests", nargs="+", help="what pytest is given (default: the tests on CUDA)")
    parser.add_argument("--tests-in", type=Path, default=ROOT, help="where pytest runs")
    parser.add_argument("--workers", type=int, default=8, help="processes that test at the same time")
    parser.add_argument("--module", type=Path, help="the native module that `check` built")
    parser.add_argument("--repeat", type=int, default=7, help="times a call is timed")
    parser.add_argument("--only", nargs="+", choices=cases, default=list(cases), metavar="CASE", help=", ".join(cases))
    parser.add_argument("--case", help="of `case`, which `measure` calls")
    return parser.parse_args()


def main() -> int:
    cases, start = all_cases(), time.monotonic()
    args = arguments(cases)
    if not args.dry_run and not torch.cuda.is_available():
        print(
            "gpu.py: torch sees no CUDA device here; --dry-run shows the cases at toy size on the CPU", file=sys.stderr
        )
        return 2
    warnings.filterwarnings("ignore", "corrupting .* does not lower the score")  # random models know nothing
    extend_path()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.call == "case":
        return one_case(args, out)
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

    def save() -> None:
        report["minutes"] = (time.monotonic() - start) / 60
        write_report(out, report)

    def record(steps: Iterable[Step]) -> None:
        for step in steps:
            report["steps"].append(asdict(step))
            save()

    if args.call == "check":
        record(check_steps(args, out, until))
    else:
        if args.module is not None:
            shutil.copy(args.module, ROOT / "knowedit_ext" / args.module.name)
        measure_cases(args, out, until, report, save)
        if not args.dry_run:
            record(sanitizers(out, until))
    save()
    for kept in [*out.glob("*.log"), *out.glob("*.report")]:  # in logs.txt
        kept.unlink()
    print((out / "gpu.md").read_text())
    return int(bool(failed_steps(report) or report["failed"]))


if __name__ == "__main__":
    sys.exit(main())
