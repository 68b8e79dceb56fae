"""Builds csrc/testing/run_kernels with the host's C++ compiler alone; objects are kept until a source changes."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"]
DEFINES = ["-DKNOWEDIT_SIMT", f"-I{CSRC / 'include'}"]
ADDRESS = (
    "-DSIMT_ADDRESSES",
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size",
    "-fno-sanitize-recover=all",
)
THREAD = ("-DSIMT_RACES", "-fsanitize=thread")


@functools.cache
def compiler() -> str:
    """A C++ compiler; skips the test where there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    pytest.skip("no C++ compiler: the kernels are not run on the CPU")


def kernels() -> list[str]:
    """The ops that have CUDA kernels."""
    return sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))


def suites() -> list[str]:
    """What csrc/testing/test_*.cpp test."""
    return sorted(path.stem.removeprefix("test_") for path in (CSRC / "testing").glob("test_*.cpp"))


def build(folder: Path, sanitizer: tuple[str, ...]) -> Path:
    """run_kernels under `sanitizer`, in `folder`; pytest.fail with the compiler's words when it does not compile."""
    folder = folder / hashlib.sha256(" ".join(sanitizer).encode()).hexdigest()[:8]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several test processes builds
        objects = [_object(folder, source, sanitizer) for source in _sources()]
        program = folder / f"run_kernels-{_digest(*(path.name for path in objects))}"
        if not program.exists():
            _compile([*sanitizer, *map(str, objects), "-o", f"{program}.new"])
            os.replace(f"{program}.new", program)
        for old in set(folder.iterdir()) - {program, folder / "lock", *objects}:
            old.unlink()
    return program


def run(program: Path, *arguments: str, timeout: float = 300) -> tuple[int, str]:
    """Exit status and everything said."""
    done = subprocess.run([program, *arguments], stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    return done.returncode, done.stdout


def _sources() -> list[Path]:
    return sorted([*(CSRC / "testing").glob("*.cpp"), *(CSRC / "cuda").glob("*.cu")])


def _object(folder: Path, source: Path, sanitizer: tuple[str, ...]) -> Path:
    # What takes the GPU's place and what the results are compared with is no part of what is watched.
    watched = source.suffix == ".cu" or "__global__" in source.read_text()
    flags = [*FLAGS, *DEFINES, *(sanitizer if watched else sanitizer[:1])]
    at = folder / f"{source.name}-{_digest(_version(), *flags, source.read_text(), _headers())}.o"
    if not at.exists():
        _compile([*flags, "-x", "c++", "-c", str(source), "-o", f"{at}.new"])
        os.replace(f"{at}.new", at)
    return at


def _compile(arguments: list[str]) -> None:
    done = subprocess.run([compiler(), *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{compiler()} {' '.join(arguments)}\n{done.stderr[-8000:]}", pytrace=False)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout


@functools.cache
def _headers() -> str:
    return "\0".join(path.read_text() for path in sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")]))
