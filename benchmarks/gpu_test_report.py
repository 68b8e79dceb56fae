"""A pytest plugin: writes to $GPU_TEST_REPORT which test has begun and how it ended, so that whoever watches knows."""

from __future__ import annotations

import os
from typing import Any


def _say(test: str, what: str) -> None:
    with open(os.environ["GPU_TEST_REPORT"], "a") as report:
        report.write(f"{test}\t{what}\n")


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _say(nodeid, "started")


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        _say(report.nodeid, "failed")


def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    with open(os.environ["GPU_TEST_REPORT"]) as report:
        failed = f"{nodeid}\tfailed\n" in report.read()
    if not failed:
        _say(nodeid, "passed")
