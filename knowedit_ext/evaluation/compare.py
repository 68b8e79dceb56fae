"""Two evaluations of the same records, compared record by record."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .report import COLUMNS, Report
from .scores import values_of

NORMAL = 1.96


def paired(first: Report, second: Report) -> dict[str, dict[str, Any]]:
    """By column, over the records that both have measured: the two means, the mean difference (second less first), half
    the width of its 95 % interval (None for a single record), and n.

    Compared is what was measured after the edit, where a run has none, before it. ValueError without common records.
    """
    sides = [_columns(report) for report in (first, second)]
    common = [case for case in sides[0] if case in sides[1]]
    if not common:
        raise ValueError("the two runs have no record in common")
    found = {}
    for column in COLUMNS:
        both = [(sides[0][case][column], sides[1][case][column]) for case in common if column in sides[0][case]
                and column in sides[1][case]]  # fmt: skip
        if both:
            values = np.array(both, np.float64)
            change = values[:, 1] - values[:, 0]
            half = NORMAL * float(change.std(ddof=1)) / math.sqrt(len(change)) if len(change) > 1 else None
            means = values.mean(axis=0).tolist()
            found[column] = dict(zip(("first", "second"), means, strict=True)) | {
                "difference": float(change.mean()),
                "half_width": half,
                "n": len(change),
            }
    return found


def _columns(report: Report) -> dict[str, dict[str, float]]:
    """By case."""
    return {str(case["case_id"]): values_of(case["post" if "post" in case else "pre"]) for case in report.cases}


def paired_table(rows: dict[str, dict[str, Any]], first: str, second: str) -> str:
    """Markdown."""
    lines = [f"| | {first} | {second} | difference | 95 % | n |", "|---|--:|--:|--:|--:|--:|"]
    for name, row in rows.items():
        half = "" if row["half_width"] is None else f"± {row['half_width']:.1f}"
        means = f"{row['first']:.1f} | {row['second']:.1f} | {row['difference']:+.1f}"
        lines.append(f"| {name} | {means} | {half} | {row['n']} |")
    return "\n".join(lines)
