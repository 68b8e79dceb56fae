"""Steps one after the other, each in a shell of its own, timed; the first that fails ends the walk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from .steps import Step

LAST_WORDS = 2000  # characters of a failed step's output
PATIENCE = 1800  # seconds a step
OURS = ("PYTHON", "VIRTUAL_ENV", "KNOWEDIT_", "MAKE", "MFLAGS")  # of whoever starts the walk, not of a newcomer


@dataclass
class Walk:
    """work: folder that steps are taken in. say: is told of each step as it ends. failed: a step did not do."""

    work: Path
    say: Callable[[str], None] = lambda line: None
    seconds: dict[str, float] = field(default_factory=dict)
    failed: bool = False

    def go(self, steps: Iterable[Step]) -> None:
        for step in steps:
            began = monotonic()
            wrong = self._take(step)
            self.seconds[step.title] = monotonic() - began
            self.say(f"{'FAILED' if wrong else 'ok':6} {self.seconds[step.title]:7.1f} s  {step.title}")
            if wrong:
                self.failed = True
                self.say(wrong)
                return

    def _take(self, step: Step) -> str:
        """What was wrong; "" where all was right."""
        place = self.work / step.place
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        shell = ["bash", "-o", "pipefail", "-c", step.command]
        try:
            done = subprocess.run(
                shell, cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=PATIENCE,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"not done after {PATIENCE} s"
        if done.returncode:
            return f"exit status {done.returncode}\n{(done.stdout + done.stderr)[-LAST_WORDS:]}"
        if missing := [text for text in step.says if text not in done.stdout]:
            return f"does not say {missing}:\n{done.stdout[-LAST_WORDS:]}"
        if absent := [name for name in step.makes if not (place / name).exists()]:
            return f"did not make {absent}"
        return ""

    def table(self) -> str:
        lines = ["| step | seconds |", "|---|--:|"]
        lines += [f"| {title.replace('|', chr(92) + '|')} | {spent:.1f} |" for title, spent in self.seconds.items()]
        return "\n".join([*lines, f"| all | {sum(self.seconds.values()):.1f} |"])
