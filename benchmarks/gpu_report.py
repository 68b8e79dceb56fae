"""What `gpu.py` says: rows of the cases, the report as JSON and Markdown, the logs. Needs nothing but Python."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_processes import FAILED

MOST = 1 << 20  # characters of a log


@dataclass
class Row:
    """One case. work: flops, or bytes where the ceiling is the copy; others: seconds of what it is compared with."""

    name: str
    error: float
    seconds: float
    work: float = 0.0
    ceiling: str = ""
    others: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self, ceilings: dict[str, float]) -> dict[str, Any]:
        rate = self.work / self.seconds
        return {
            "case": self.name,
            "error": self.error,
            "seconds": self.seconds,
            "rate": rate,
            "ceiling": self.ceiling,
            "share": rate / ceilings[self.ceiling] if self.ceiling in ceilings else None,
            "others": self.others,
            "ratios": {name: seconds / self.seconds for name, seconds in self.others.items()},
            **self.facts,
        }


def failed_steps(report: dict[str, Any]) -> list[str]:
    return [step["name"] for step in report["steps"] if step["status"] == FAILED]


def describe(report: dict[str, Any]) -> str:
    """The report as Markdown: what the steps that failed ended with comes first, for a terminal keeps the last."""
    lines = []
    for s in report["steps"]:
        if s["detail"]:
            lines += [f"{s['name']}, {s['status']}:", "", "```", s["detail"], "```", ""]
    lines += [f"{report['machine']}, torch {report['torch']}, commit {report['commit']}", ""]
    if report["dry_run"]:
        lines += ["A dry run at toy size on the CPU: the times mean nothing.", ""]
    if report["steps"]:
        lines += ["| step | outcome | s |", "|---|---|--:|"]
        for s in report["steps"]:
            last = s["detail"].splitlines()[-1] if s["detail"] else ""
            lines.append(f"| {s['name']} | {s['status']} {last} | {s['seconds']:.0f} |")
        lines.append("")
    if report["ceilings"]:
        lines += ["| ceiling | T/s |", "|---|--:|"]
        lines += [f"| {name} | {rate / 1e12:.3g} |" for name, rate in report["ceilings"].items()]
        lines.append("")
    if report["cases"]:
        lines += ["| case | ms | T(flop or byte)/s | of ceiling | beside | error |", "|---|--:|--:|--:|---|--:|"]
        lines += [f"| {' | '.join(_cells(case))} |" for case in report["cases"]]
        lines.append("")
    for title in ("failed", "not_run"):
        lines += [f"{title.replace('_', ' ').upper()}: {name}: {why}" for name, why in report[title].items()]
    lines += [f"Left out: {what}." for what in report["left_out"]]
    return "\n".join(lines) + "\n"


def _cells(case: dict[str, Any]) -> list[str]:
    beside = [f"{name} {ratio:.2f}x" for name, ratio in case["ratios"].items()]
    beside += [f"{k.replace('_', ' ')} {v:.3g}" for k, v in case.items() if k.startswith("minutes")]
    rate, share = "", ""
    if case["share"] is not None:
        rate, share = f"{case['rate'] / 1e12:.3g}", f"{case['share']:.0%} ({case['ceiling']})"
    return [case["case"], f"{1e3 * case['seconds']:.3g}", rate, share, ", ".join(beside), f"{case['error']:.0e}"]


def write_report(out: Path, logs: Path, report: dict[str, Any]) -> None:
    """With all logs in one file: few files come back from where a GPU is lent."""
    whole = sorted(logs.glob("*.log"), key=lambda log: log.stat().st_mtime)
    files = {
        "gpu.json": json.dumps(report, indent=1) + "\n",
        "gpu.md": describe(report),
        "logs.txt": "".join(f"==== {log.stem}\n{log.read_text(errors='replace')[-MOST:]}\n" for log in whole),
    }
    for name, text in files.items():
        (out / f"{name}.new").write_text(text)
        (out / f"{name}.new").replace(out / name)
