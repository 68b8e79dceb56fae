"""Commands and tests in processes of their own: one that hangs, dies or spoils the device costs itself alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"
START = 60  # seconds that a process of tests has until its first one: torch is imported, a context made
POLL = 0.1
GONE = 10  # seconds to wait for what was killed
# Of tests: no plugins that only this machine has; what torch asks for where a test wants equal bits of a product.
TESTING = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
DEVICE_LOST = 70  # exit status of a process of tests whose device answers no more
# A group of its own, so that `end` reaches whatever it starts; no session of its own, which would outlive a terminal
# that is killed, and hold the device.
GROUP: Mapping[str, int] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": 1}


@dataclass(frozen=True)
class Step:
    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Tested:
    """What became of tests: by name, why one failed and why one was skipped; those there was no time for."""

    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def environment(**more: str) -> dict[str, str]:
    built = any((ROOT / "knowedit_ext").glob("_C*"))  # else what is installed is measured
    path = [*[str(ROOT)] * built, str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(path), "KNOWEDIT_REQUIRE_NATIVE": "1", "PYTHONUNBUFFERED": "1"}
    ours["HF_HUB_OFFLINE"] = "1"  # nothing is waited for that is not on the disk
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return kept | ours | more


def start(command: Sequence[str], log: Path, cwd: Path = ROOT, **env: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, cwd=cwd, env=environment(**env), stdout=stream, stderr=subprocess.STDOUT, **GROUP
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and all that it started, and wait until they are gone: not for ever, a driver that hangs keeps them; nor
    for those that nobody asks how they ended."""
    begun = ended = time.monotonic()
    while time.monotonic() < (ended + 1 if process.poll() is not None else begun + GONE):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        if process.returncode is None:
            ended = time.monotonic()
        time.sleep(POLL / 2)
    if process.returncode is None:
        print(f"   process {process.pid} does not end", flush=True)


def last_words(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def run_step(name: str, command: Sequence[str], out: Path, limit: float, **env: str) -> Step:
    """A command with its log in OUT; running out of time is a failure too."""
    if limit <= 0:
        return Step(name, NOT_RUN, detail="no time left")
    print(f"-- {name}: {' '.join(command)}", flush=True)
    begun, log = time.monotonic(), out / f"{name}.log"
    try:
        process = start(command, log, **env)
    except OSError as error:
        return Step(name, FAILED, detail=f"{command[0]} does not start: {error}")
    try:
        done: object = process.wait(limit)
    except subprocess.TimeoutExpired:
        done = f"no end within {limit:.0f} s"
    end(process)  # what it left running too
    detail = "" if done == 0 else f"{done}: {last_words(log)}"
    step = Step(name, PASSED if done == 0 else FAILED, time.monotonic() - begun, detail)
    print(f"   {name}: {step.status}, {step.seconds:.0f} s\n{step.detail}", flush=True)
    return step


# -- tests ------------------------------------------------------------------------------------------------------------


def collect(cwd: Path, *arguments: str, limit: float = 120) -> tuple[list[str], list[str]]:
    """The tests that pytest finds, and the files that it cannot read; RuntimeError with its words where it finds no
    test."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    options = {"cwd": cwd, "env": environment(**TESTING), "capture_output": True, "text": True}
    try:
        found = subprocess.run([*command, "--continue-on-collection-errors"], timeout=limit, **options)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"pytest {' '.join(arguments)} has found no test within {limit:.0f} s") from None
    lines = found.stdout.splitlines()
    broken = [line.removeprefix("ERROR ") for line in lines if line.startswith("ERROR ")]
    tests = [line for line in lines if "::" in line and not line.startswith(("ERROR", "FAILED"))]
    if not tests:
        raise RuntimeError(f"pytest {' '.join(arguments)} finds no test: {found.stdout[-2000:]}{found.stderr[-2000:]}")
    return tests, broken


def run_tests(tests: Sequence[str], cwd: Path, out: Path, limit: float, until: float, workers: int = 1) -> Tested:
    """cwd: where they were collected; limit: the seconds that a test has."""
    shares = [list(tests[n::workers]) for n in range(min(workers, len(tests)))]
    with ThreadPoolExecutor(len(shares) or 1) as pool:
        names = [out / f"tests-{number}" for number in range(len(shares))]
        parts = list(pool.map(lambda share, name: _share(share, cwd, name, limit, until), shares, names))
    whole = Tested()
    for part in parts:
        whole.failed |= part.failed
        whole.skipped |= part.skipped
        whole.left += part.left
    return whole


def _share(tests: list[str], cwd: Path, name: Path, limit: float, until: float) -> Tested:
    """One after the other, in as few processes as can be: the next begins in a new one where one hung, died, or lost
    the device (`gpu_test_report`)."""
    done, starts_in_vain = Tested(left=list(tests)), 0
    log, report = name.with_suffix(".log"), name.with_suffix(".report")
    log.write_bytes(b"")
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_test_report"]
    options += ["-o", f"faulthandler_timeout={0.75 * limit}"]  # where one hangs
    while done.left and time.monotonic() < until:
        report.write_text("")
        few = {**TESTING, "OMP_NUM_THREADS": "2", "GPU_TEST_REPORT": str(report)}  # threads: others test beside it
        process = start([sys.executable, *options, *done.left], log, cwd, **few)
        why = _follow(process, report, limit, until)
        end(process)
        begun = None
        for line in report.read_text().rpartition("\n")[0].splitlines():
            test, said, words = json.loads(line)
            begun = test if said == "started" else None
            if said == "started":
                continue
            done.left.remove(test)
            if said != PASSED:
                (done.failed if said == FAILED else done.skipped)[test] = words
            starts_in_vain = 0
        if why == "no time left":
            break
        if begun is not None:
            done.left.remove(begun)
            done.failed[begun] = f"{why}: {_where(log)}"
        elif done.left and process.returncode != DEVICE_LOST:  # no test is to blame: it did not come so far
            starts_in_vain += 1
            if starts_in_vain == 2:
                done.failed |= {test: f"{why}, before it began: {last_words(log)}" for test in done.left}
                done.left = []
    return done


def _where(log: Path) -> str:
    """What stood in the log last; of a stack, which begins with the call that hangs, the beginning."""
    last = last_words(log, 200)
    at = last.rfind("(most recent call first)")
    return "\n".join(last[at:].splitlines()[:15]) if at >= 0 else "\n".join(last.splitlines()[-15:])


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
