"""The CUDA kernels on the CPU (csrc/testing/simt.h): right under any order of threads, within bounds, without races."""

from __future__ import annotations

from pathlib import Path

import pytest
from simt import harness


@pytest.fixture(scope="session")
def checked(request: pytest.FixtureRequest) -> Path:
    """run_kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""
    return harness.build(request.config.cache.mkdir("simt"), harness.ADDRESS)


@pytest.fixture(scope="session")
def watched(request: pytest.FixtureRequest) -> Path:
    """run_kernels under ThreadSanitizer, to which every CUDA thread is a thread."""
    program = harness.build(request.config.cache.mkdir("simt"), harness.THREAD)
    status, output = harness.run(program, "simt_barrier")
    if status and "ThreadSanitizer: unexpected memory mapping" in output:
        pytest.skip("ThreadSanitizer does not run on this kernel: races are not looked for")
    return program


def test_every_kernel_has_its_cases():
    assert set(harness.kernels()) <= set(harness.suites())


@pytest.mark.parametrize("suite", harness.suites())
def test_cases(checked, suite):
    status, output = harness.run(checked, "--seeds", "3", suite)
    assert status == 0, output


@pytest.mark.parametrize("suite", harness.suites())
def test_no_races(watched, suite):
    status, output = harness.run(watched, "--seeds", "1", suite)
    assert status == 0, output


@pytest.mark.parametrize(
    "case, message",
    [
        ("broken_missing_barrier", "FAILED broken_missing_barrier, seed"),
        ("broken_missing_barrier_before_atomics", "FAILED broken_missing_barrier_before_atomics, seed"),
        ("broken_copies_not_awaited", "FAILED broken_copies_not_awaited, seed 0: element 0 is -nan"),
        ("broken_shared_overflow", "AddressSanitizer: heap-buffer-overflow"),
        ("broken_dynamic_overflow", "AddressSanitizer: heap-buffer-overflow"),
    ],
)
def test_mistakes_are_found(checked, case, message):
    status, output = harness.run(checked, case)
    assert status != 0 and message in output


@pytest.mark.parametrize(
    "case", ["broken_race", "broken_race_between_blocks", "broken_missing_barrier", "broken_shuffle_is_no_barrier"]
)
def test_races_are_found(watched, case):
    status, output = harness.run(watched, "--seeds", "1", case)
    assert status != 0 and "ThreadSanitizer: data race" in output
