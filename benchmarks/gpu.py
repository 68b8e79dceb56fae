"""Everything that needs a GPU, in one command without a network: build, tests, checks, then benchmarks.

    make gpu [GPU_OUT=out/gpu] [GPU_PYTHON=python3]
    python benchmarks/gpu.py OUT [--conformance DIR] [--skip-build] [--minutes 8] [--only CASE ...]
    python benchmarks/gpu.py OUT --dry-run      the cases at toy size on the CPU: shows that they work

Writes OUT/gpu.json, OUT/gpu.md and a log of every step. No time is measured unless every step before it passed, and no
case reports one whose own check failed. Exit status: 0 all passed, 1 something failed, 2 there is no GPU.

DIR (default: out/conformance, which git ignores) is a copy of the conformance checks, with check.py in it.
"""

from __future__ import annotations

import argparse
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
Case = Callable[[Bench], Iterator[Row]]
LEFT_OUT = ("wgmma and TMA kernels for sm_90a: not written, the sm_80 kernels run there",)
PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"


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
    print(f"-- {name}: {' '.join(command)}", flush=True)
    start, log = time.monotonic(), out / f"{name}.log"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, "KNOWEDIT_REQUIRE_NATIVE": "1", **env},
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=limit,
            ).returncode
        except subprocess.TimeoutExpired:
            done = f"no end within {limit:.0f} s"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
    step = Step(name, PASSED if done == 0 else FAILED, time.monotonic() - start, "" if done == 0 else f"{done}: {tail}")
    print(f"   {step.status}, {step.seconds:.0f} s\n{step.detail}", flush=True)
    return step


def steps(args: argparse.Namespace, out: Path) -> Iterator[Step]:
    """Build, tests on CUDA, conformance, sanitizers."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if not args.skip_build:
        major, minor = torch.cuda.get_device_capability()
        archs = {"KNOWEDIT_CUDA": "ON", "KNOWEDIT_CUDA_ARCHS": f"{major}{minor}{'a' if major >= 9 else ''}-real"}
        yield run_step("build", [python, "setup.py", "build_ext", "--inplace"], out, 240, **archs)
    yield run_step("tests", [*pytest, "python_tests", "-k", "cuda"], out, 180)
    if (args.conformance / "check.py").is_file():
        yield run_step("conformance", [python, str(args.conformance / "check.py"), "--device", "cuda"], out, 180)
    else:
        yield Step("conformance", NOT_RUN, detail=f"no check.py in {args.conformance}: copy the checks there")
    for tool in ("memcheck", "racecheck"):
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            yield Step(tool, NOT_RUN, detail="compute-sanitizer is not installed")
            continue
        # Without its pool, torch's neighbours in memory do not hide an access outside.
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest, "python_tests/ops/test_on_cuda.py"]
        command += ["-k", "sanitized"]
        yield run_step(tool, command, out, 120, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def run_cases(
    bench: Bench, cases: dict[str, Case], deadline: float
) -> tuple[list[Row], dict[str, str], dict[str, str]]:
    """Rows; what failed and what there was no time for, by case."""
    rows: list[Row] = []
    failed: dict[str, str] = {}
    not_run: dict[str, str] = {}
    for name, case in cases.items():
        if time.monotonic() > deadline:
            not_run[name] = "no time left"
            continue
        try:
            for row in case(bench):
                print(f"{row.name}: {row.seconds:.3g} s, error {row.error:.1e}", flush=True)
                rows.append(row)
                if time.monotonic() > deadline:
                    not_run[f"{name}, after '{row.name}'"] = "no time left"
                    break
        except CheckFailed as error:
            failed[name] = str(error)
        except torch.OutOfMemoryError:
            not_run[f"{name}, part of it"] = "out of memory"
        except Exception as error:  # one broken case must not take the others' numbers along
            failed[name] = f"{type(error).__name__}: {error}"
        if name in failed:
            print(f"{name}: FAILED, {failed[name]}", flush=True)
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return rows, failed, not_run


def describe(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"{report['machine']}, torch {report['torch']}, commit {report['commit']}", ""]
    if report["dry_run"]:
        lines += ["A dry run at toy size on the CPU: the times mean nothing.", ""]
    lines += ["| step | outcome | s |", "|---|---|--:|"]
    lines += [
        f"| {s['name']} | {s['status']} {s['detail'].splitlines()[0] if s['detail'] else ''} | {s['seconds']:.0f} |"
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
    return "\n".join(lines) + "\n"


def write_report(out: Path, report: dict[str, Any]) -> None:
    (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu.md").write_text(describe(report))


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def arguments(cases: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--conformance", type=Path, default=ROOT / "out" / "conformance")
    parser.add_argument("--skip-build", action="store_true", help="the native module in the tree is up to date")
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
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench("cpu" if args.dry_run else "cuda", args.dry_run)
    report: dict[str, Any] = {
        "machine": "the CPU" if args.dry_run else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit(),
        "dry_run": args.dry_run,
        "steps": [] if args.dry_run else [asdict(step) for step in steps(args, out)],
        "ceilings": {},
        "cases": [],
        "failed": {},
        "not_run": {},
        "left_out": list(LEFT_OUT),
    }
    broken = [step["name"] for step in report["steps"] if step["status"] == FAILED]
    if broken:
        report["not_run"] = dict.fromkeys(args.only, f"{', '.join(broken)} failed, so no times are reported")
    else:
        report["ceilings"] = measure_ceilings(bench)
        rows, report["failed"], report["not_run"] = run_cases(
            bench, {name: cases[name] for name in args.only}, start + 60 * args.minutes
        )
        report["cases"] = [row.as_dict(report["ceilings"]) for row in rows]
    report["minutes"] = (time.monotonic() - start) / 60
    write_report(out, report)
    print((out / "gpu.md").read_text())
    return int(bool(broken or report["failed"]))


if __name__ == "__main__":
    sys.exit(main())
