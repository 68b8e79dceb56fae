"""What a campaign found, as JSON and as the tables of docs/reliability.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .kills import Trial
from .outcome import Finding

_TRIAL = ("kills", "interrupts", "full", "together", "resumed", "identical")
_HEADS = ("killed", "Ctrl-C", "disk full", "two at once", "gone on with", "identical", "findings")


@dataclass
class Results:
    """Rows by door and by command; findings go to `folder/findings.jsonl` as they come."""

    folder: Path
    inputs: dict[str, Counter[str]] = field(default_factory=dict)
    trials: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._told = (self.folder / "findings.jsonl").open("w")

    def add_input(self, door: str, outcome: str | Finding) -> None:
        row = self.inputs.setdefault(door, Counter())
        row["inputs"] += 1
        row["findings" if isinstance(outcome, Finding) else outcome] += 1
        self._tell([outcome] if isinstance(outcome, Finding) else [])

    def add_trial(self, told: Trial) -> None:
        row = self.trials.setdefault(told.command, Counter())
        row.update({name: getattr(told, name) for name in _TRIAL})
        row["findings"] += len(told.findings)
        self._tell(told.findings)

    def _tell(self, findings: Sequence[Finding]) -> None:
        self.findings += findings
        for finding in findings:
            self._told.write(json.dumps(asdict(finding)) + "\n")
            self._told.flush()

    def save(self) -> str:
        """results.json and results.md; returns what the latter says."""
        text = self.markdown()
        found: dict[str, Any] = {"inputs": self.inputs, "trials": self.trials, "seconds": round(self.seconds)}
        (self.folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
        (self.folder / "results.md").write_text(text)
        return text

    def markdown(self) -> str:
        parts = []
        if self.inputs:
            columns = ("inputs", "accepted", "refused", "findings")
            parts.append(_table("door", columns, columns, self.inputs))
        if self.trials:
            parts.append(_table("command", _HEADS, (*_TRIAL, "findings"), self.trials))
        kinds = Counter(finding.family for finding in self.findings)
        parts.append(f"{len(self.findings)} findings of {len(kinds)} kinds in {self.seconds / 60:.1f} minutes.\n")
        return "\n".join(parts)


def _table(name: str, heads: Sequence[str], keys: Sequence[str], rows: Mapping[str, Mapping[str, int]]) -> str:
    lines = [f"| {name} | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    total = Counter()
    for label, row in rows.items():
        total.update(row)
        lines.append(f"| {label} | {' | '.join(str(row.get(key, 0)) for key in keys)} |")
    lines.append(f"| all | {' | '.join(f'**{total[key]}**' for key in keys)} |")
    return "\n".join(lines) + "\n"
