"""Forked processes end as others do, and ranks do not outlive one that fails."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from .support.forked import Forked, Ranks, knowedit

ENDS = {
    "pass": (0, ""),
    "raise SystemExit(7)": (7, ""),
    "raise SystemExit('a word')": (1, "a word\n"),
    "import os; os._exit(9)": (9, ""),
    "import atexit; atexit.register(print, 'at the end')": (0, ""),
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": (-9, ""),
}


@pytest.mark.parametrize("code", ENDS)
def test_an_end(code: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(f"import sys\nprint(sys.argv[1:], flush=True)\n{code}\n")
    process = Forked(["script.py", "a"], tmp_path, errors=True)
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr.decode()) == ENDS[code]
    assert stdout.decode() == "['a']\n" + "at the end\n" * ("atexit" in code)


def test_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("1 / 0\n")
    process = Forked(["script.py"], tmp_path, errors=True)
    assert process.communicate()[1].decode().endswith("ZeroDivisionError: division by zero\n")
    assert process.returncode == 1


def test_a_command(tmp_path: Path) -> None:
    done = knowedit("trace", "absent", "--prompt", "{} is", "--subject", "Ann", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("knowedit: ") and not done.stdout


def test_ranks_end_with_the_first_that_fails(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os, sys\nfrom knowedit_ext.runs.ranks import Ranks\nranks = Ranks()\nassert ranks.size == 2\n"
        "ranks.wait()\nsys.exit(3) if ranks.rank else ranks.wait()\n"
    )
    ranks, began = Ranks(["script.py"], tmp_path), time.monotonic()
    ranks.communicate()
    assert ranks.returncode and time.monotonic() - began < 200
    assert all(process.poll() is not None for process in ranks.processes)
