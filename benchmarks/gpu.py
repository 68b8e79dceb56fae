"""Everything that needs a GPU, in one command without a network: build, tests, checks, then benchmarks.

    make gpu [GPU_OUT=out/gpu] [GPU_PYTHON=python3]
    python benchmarks/gpu.py OUT [--conformance DIR] [--skip-build] [--keep-going] [--only CASE ...]
    python benchmarks/gpu.py OUT --dry-run      the cases at toy size on the CPU: shows that they work

Writes OUT/gpu.json, OUT/gpu.md and a log of every step; the two reports anew after each step and row, so that they are
there whatever ends the process. Nothing is timed after a step that failed, unless --keep-going is given: then those
steps are named above the times. No case ever reports a time whose own check failed. Exit status: 0 all passed, 1
something failed, 2 there is no GPU.

DIR (default: out/conformance, which git ignores) is a copy of the conformance checks, with check.py in it.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_measure import Bench, CheckFailed, Row, measure_ceilings

ROOT = Path(__file__).resolve().parent.parent
Case = Callable[[Bench], Iterator[Row | Callable[[], Row]]]
LEFT_OUT = ("wgmma and TMA for anything but moment_update of 16-bit rows: not written, the sm_80 kernels run there",)
STEPS_SHARE = 0.65  # of the time: build and tests have ended by then, the rest is for measuring
PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"
WGMMA_TESTS = "tests-wgmma"


@dataclass(frozen=True)
class Step:
    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""


def all_cases() -> dict[str, Case]:
    import gpu_kernels
    import gpu_models

    return gpu_kernels.CASES | gpu_models.CASES


def run_step(name: str, command: list[str], out: Path, limit: float, **env: str) -> Step:
    """A command with its log in OUT; running out of time is a failure too."""
    if limit <= 0:
        return Step(name, NOT_RUN, detail="no time left")
    print(f"-- {name}: {' '.join(command)}", flush=True)
    start, log = time.monotonic(), out / f"{name}.log"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, "KNOWEDIT_REQUIRE_NATIVE": "1", "PYTHONUNBUFFERED": "1", **env},
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=limit,
            ).returncode
        except subprocess.TimeoutExpired:
            done = f"no end within {limit:.0f} s"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
    step = Step(name, PASSED if done == 0 else FAILED, time.monotonic() - start, "" if done == 0 else f"{done}: {tail}")
    print(f"   {step.status}, {step.seconds:.0f} s\n{step.detail}", flush=True)
    return step


def pytest(*arguments: str) -> list[str]:
    # By name, so that the log ends with the test that hung.
    return [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments]


def steps(args: argparse.Namespace, out: Path, until: float) -> Iterator[Step]:
    """Build, then tests on CUDA and conformance; nothing after a build that failed."""

    def limit(seconds: float) -> float:
        return min(seconds, until - time.monotonic())

    if not args.skip_build:
        major, minor = torch.cuda.get_device_capability()
        archs = {"KNOWEDIT_CUDA": "ON", "KNOWEDIT_CUDA_ARCHS": f"{major}{minor}{'a' if major >= 9 else ''}-real"}
        build = run_step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], out, limit(240), **archs)
        yield build
        if build.status != PASSED:
            return
    yield run_step("tests", pytest("python_tests", "-k", "cuda and not wgmma"), out, limit(180))
    # Apart: should a barrier of theirs hang, nothing else is lost.
    yield run_step(WGMMA_TESTS, pytest("python_tests/ops/test_on_cuda.py", "-k", "wgmma"), out, limit(60))
    if (args.conformance / "check.py").is_file():
        command = [sys.executable, str(args.conformance / "check.py"), "--device", "cuda"]
        yield run_step("conformance", command, out, limit(180))
    else:
        yield Step("conformance", NOT_RUN, detail=f"no check.py in {args.conformance}: copy the checks there")


def sanitizers(out: Path, until: float) -> Iterator[Step]:
    """memcheck and racecheck, in what time is left: they are slow."""
    for tool in ("memcheck", "racecheck"):
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            yield Step(tool, NOT_RUN, detail="compute-sanitizer is not installed")
            continue
        tests = pytest("python_tests/ops/test_on_cuda.py", "-k", "sanitized")
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *tests]
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
    broken = failed_steps(report)
    if broken and report["cases"]:
        lines += [f"**{', '.join(broken)} FAILED.** What is timed below passed its own check, and that alone.", ""]
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
        if case["ceiling"]:
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
    (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu.md").write_text(describe(report))


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
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--conformance", type=Path, default=ROOT / "out" / "conformance")
    parser.add_argument("--skip-build", action="store_true", help="the native module in the tree is up to date")
    parser.add_argument("--keep-going", action="store_true", help="measure although tests or conformance failed")
    parser.add_argument("--minutes", type=float, default=8, help="no case begins after so many")
    parser.add_argument("--only", nargs="+", choices=cases, default=list(cases), metavar="CASE", help=", ".join(cases))
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
    bench = Bench("cpu" if args.dry_run else "cuda", args.dry_run)
    report: dict[str, Any] = {
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

    excluded: dict[str, str] = {}
    whole = 60 * args.minutes

    def save() -> None:
        report["minutes"] = (time.monotonic() - start) / 60
        write_report(out, report)

    def save_cases(rows: list[Row], failed: dict[str, str], not_run: dict[str, str]) -> None:
        measured = [row.as_dict(report["ceilings"]) for row in rows]
        report.update(cases=measured, failed=failed, not_run=excluded | not_run)
        save()

    def record(steps: Iterable[Step]) -> None:
        for step in steps:
            report["steps"].append(asdict(step))
            save()

    if not args.dry_run:
        os.environ["KNOWEDIT_REQUIRE_NATIVE"] = "1"  # what is timed is never the plain-torch fallback
        # A kernel that hangs lets nothing end in this process but this.
        faulthandler.dump_traceback_later(whole + 60, exit=True)
        record(steps(args, out, start + STEPS_SHARE * whole))
    status = {step["name"]: step["status"] for step in report["steps"]}
    broken = [name for name in failed_steps(report) if name != WGMMA_TESTS]
    if status.get("build", PASSED) != PASSED:
        report["not_run"] = dict.fromkeys(args.only, "there is no build to measure")
    elif broken and not args.keep_going:
        report["not_run"] = dict.fromkeys(args.only, f"{', '.join(broken)} failed; --keep-going measures all the same")
    else:
        if status.get(WGMMA_TESTS, PASSED) != PASSED and "moment_update_wgmma" in args.only:
            excluded["moment_update_wgmma"] = f"{WGMMA_TESTS} {status[WGMMA_TESTS]}"
        report["ceilings"] = measure_ceilings(bench)
        chosen = {name: cases[name] for name in args.only if name not in excluded}
        run_cases(bench, chosen, start + whole, save_cases)
        if not args.dry_run:
            record(sanitizers(out, start + whole + 45))
    save()
    faulthandler.cancel_dump_traceback_later()
    print((out / "gpu.md").read_text())
    return int(bool(failed_steps(report) or report["failed"]))


if __name__ == "__main__":
    sys.exit(main())
