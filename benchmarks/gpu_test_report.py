"""A pytest plugin: writes to $GPU_TEST_REPORT, a JSON line each, which test has begun and how it ended, so that whoever
watches knows. A test ends when the device has done what it was given; where that is lost, the process ends."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator
from typing import Any

import pytest
from gpu_processes import DEVICE_LOST, FAILED, PASSED

WORDS = 4000
_outcome: dict[str, tuple[str, str]] = {}


def _say(*line: str) -> None:
    with open(os.environ["GPU_TEST_REPORT"], "a") as report:
        report.write(json.dumps(line) + "\n")


def _wait_for_device() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _answers() -> bool:
    try:
        _wait_for_device()
    except RuntimeError:
        return False
    return True


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _outcome[nodeid] = (PASSED, "")
    _say(nodeid, "started", "")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """What a kernel did wrong is told of the test that launched it, not of the next."""
    result = yield
    _wait_for_device()
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _outcome[report.nodeid] = (FAILED, report.longreprtext[-WORDS:])
    elif report.skipped:
        words = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
        _outcome[report.nodeid] = ("skipped", words)


def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    outcome, words = _outcome.pop(nodeid)
    _say(nodeid, outcome, words)
    if outcome == FAILED and ("CUDA error" in words or not _answers()):
        os._exit(DEVICE_LOST)
