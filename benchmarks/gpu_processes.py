"""Commands and tests in processes of their own: one that hangs, dies or spoils the device costs itself alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"
START = 60  # seconds that a process of tests has until its first one: torch is imported, a context made
POLL = 0.1


@dataclass(frozen=True)
class Step:
    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""


def environment(**more: str) -> dict[str, str]:
    built = any((ROOT / "knowedit_ext").glob("_C*"))  # else what is installed is measured
    path = [*[str(ROOT)] * built, str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(path), "KNOWEDIT_REQUIRE_NATIVE": "1", "PYTHONUNBUFFERED": "1"}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return kept | ours | more


def start(command: Sequence[str], log: Path, cwd: Path = ROOT, **env: str) -> subprocess.Popen[bytes]:
    """In a session of its own, so that `end` reaches whatever it starts."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, cwd=cwd, env=environment(**env), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and all that it started; a second at most until they are gone."""
    for _ in range(20):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            break
        process.wait()
        time.sleep(POLL / 2)
    process.wait()


def last_words(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def run_step(name: str, command: Sequence[str], out: Path, limit: float, **env: str) -> Step:
    """A command with its log in OUT; running out of time is a failure too."""
    if limit <= 0:
        return Step(name, NOT_RUN, detail="no time left")
    print(f"-- {name}: {' '.join(command)}", flush=True)
    begun, log = time.monotonic(), out / f"{name}.log"
    process = start(command, log, **env)
    try:
        done: object = process.wait(limit)
    except subprocess.TimeoutExpired:
        done = f"no end within {limit:.0f} s"
    end(process)  # what it left running too
    detail = "" if done == 0 else f"{done}: {last_words(log)}"
    step = Step(name, PASSED if done == 0 else FAILED, time.monotonic() - begun, detail)
    print(f"   {step.status}, {step.seconds:.0f} s\n{step.detail}", flush=True)
    return step


# -- tests ------------------------------------------------------------------------------------------------------------


def collect(cwd: Path, *arguments: str) -> list[str]:
    """The tests that pytest finds; RuntimeError with its words where it finds none."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    found = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    tests = [line for line in found.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "FAILED"))]
    if not tests:
        raise RuntimeError(f"pytest {' '.join(arguments)} finds no test: {found.stdout[-2000:]}{found.stderr[-2000:]}")
    return tests


def run_tests(
    tests: Sequence[str], cwd: Path, out: Path, limit: float, until: float, workers: int = 1
) -> tuple[dict[str, str], list[str]]:
    """(Why a test failed, by its name; those that there was no time for). cwd: where they were collected; limit: the
    seconds that a test has."""
    shares = [list(tests[n::workers]) for n in range(min(workers, len(tests)))]
    with ThreadPoolExecutor(len(shares) or 1) as pool:
        names = [out / f"tests-{number}" for number in range(len(shares))]
        parts = list(pool.map(lambda share, name: _share(share, cwd, name, limit, until), shares, names))
    failed = {test: why for part, _ in parts for test, why in part.items()}
    return failed, [test for _, left in parts for test in left]


def _share(tests: list[str], cwd: Path, name: Path, limit: float, until: float) -> tuple[dict[str, str], list[str]]:
    """One after the other, in as few processes as failures allow: after one that failed the next begins in a new one,
    for the device may be lost to that."""
    failed: dict[str, str] = {}
    left, log, report = list(tests), name.with_suffix(".log"), name.with_suffix(".report")
    while left and time.monotonic() < until:
        report.write_text("")
        log.write_bytes(b"")
        options = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "gpu_test_report"]
        process = start([sys.executable, *options, *left], log, cwd, GPU_TEST_REPORT=str(report))
        why = _follow(process, report, limit, until)
        end(process)
        outcome = dict(line.rsplit("\t", 1) for line in report.read_text().splitlines())
        for test, said in outcome.items():
            if said != "started":
                left.remove(test)
        broken = [test for test, said in outcome.items() if said == "failed"]
        hung = [test for test, said in outcome.items() if said == "started"]
        if broken:
            failed[broken[0]] = last_words(log)
        elif hung and why != "no time left":
            left.remove(hung[0])
            failed[hung[0]] = f"{why}: {last_words(log, 10)}"
        elif left and why != "no time left":  # no test is to blame: it did not come so far
            failed[left.pop(0)] = f"{why or 'no test ran'}: {last_words(log)}"
    return failed, left


def _follow(process: subprocess.Popen[bytes], report: Path, limit: float, until: float) -> str:
    """Wait until it ends, or says nothing for too long; how that came about."""
    said, since = 0, time.monotonic()
    while process.poll() is None:
        now, size = time.monotonic(), report.stat().st_size
        if size != said:
            said, since = size, now
        if now > until:
            return "no time left"
        if now - since > (limit if said else max(limit, START)):
            return f"no end within {limit:.0f} s"
        time.sleep(POLL)
    return f"the process ended with {process.returncode}"
