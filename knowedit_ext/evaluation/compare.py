"""Two evaluations of the same records, compared record by record."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np

from .mean import Mean
from .report import COLUMNS, Report
from .scores import harmonic, harmonic_difference, parts_of_s, values_of

NORMAL = 1.96


def paired(first: Report, second: Report) -> dict[str, dict[str, Any]]:
    """By column, over the records that both have measured: the two means, the mean difference (second less first), half
    the width of its 95 % interval (None for a single record), and n.

    S is of the records that have all its parts; its interval is of the pairs' linearised difference. Compared is what
    was measured after the edit, where a run has none, before it. ValueError without common records.
    """
    sides = [_by_case(report) for report in (first, second)]
    common = [case for case in sides[0] if case in sides[1]]
    if not common:
        raise ValueError("the two runs have no record in common")
    found = {}
    for column in COLUMNS:
        parts = parts_of_s(chain(*(sides[0][case] for case in common))) if column == "S" else (column,)
        complete = [case for case in common if all(part in side[case] for side in sides for part in parts)]
        if complete:
            one, other = (np.array([[side[case][part] for part in parts] for case in complete]) for side in sides)
            found[column] = _row(one, other)
    return found


def _row(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Of values [records, parts]."""
    if first.shape[1] > 1:
        means, change = [harmonic(values).mean for values in (first, second)], harmonic_difference(second, first)
    else:
        means, change = [float(values.mean()) for values in (first, second)], Mean.of((second - first)[:, 0])
    half = None if change.stderr is None else NORMAL * change.stderr
    return dict(zip(("first", "second"), means, strict=True)) | {
        "difference": change.mean,
        "half_width": half,
        "n": change.n,
    }


def _by_case(report: Report) -> dict[str, dict[str, float]]:
    return {str(case["case_id"]): values_of(case["post" if "post" in case else "pre"]) for case in report.cases}


def paired_table(rows: dict[str, dict[str, Any]], first: str, second: str) -> str:
    """Markdown."""
    lines = [f"| | {first} | {second} | difference | 95 % | n |", "|---|--:|--:|--:|--:|--:|"]
    for name, row in rows.items():
        half = "" if row["half_width"] is None else f"± {row['half_width']:.1f}"
        means = f"{row['first']:.1f} | {row['second']:.1f} | {row['difference']:+.1f}"
        lines.append(f"| {name} | {means} | {half} | {row['n']} |")
    return "\n".join(lines)
