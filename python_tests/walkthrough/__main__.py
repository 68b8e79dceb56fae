"""What a newcomer does from a fresh clone, in order, with times.

docs/index.md from top to bottom; then the edit is handed to somebody else, and a page is opened in a browser.

python -m walkthrough --work DIR     the clone is made below DIR, which has to be empty or absent
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from .steps import ROOT, steps_of
from .walk import Walk


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m walkthrough", description=__doc__)
    options.add_argument("--source", default=str(ROOT), help="what to clone; default: this repository")
    options.add_argument("--work", type=Path, help="kept; default: a temporary folder")
    chosen = options.parse_args()
    if chosen.work is None:
        with TemporaryDirectory(prefix="walkthrough-") as folder:
            return walk(chosen.source, Path(folder))
    if chosen.work.exists() and any(chosen.work.iterdir()):
        options.error(f"'{chosen.work}' is not empty")
    return walk(chosen.source, chosen.work)


def walk(source: str, work: Path) -> int:
    work.mkdir(parents=True, exist_ok=True)
    walked = Walk(work.resolve(), say=lambda line: print(line, flush=True))
    walked.go(steps_of(source))
    print(walked.table())
    return walked.failed


if __name__ == "__main__":
    sys.exit(main())
