"""What an evaluation found: cases, and the papers' table, a breakdown by relation, the worst cases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import typed
from ..datasets.questions import asked_texts, rewrites_of
from ..frames import frame
from ..notebook import html_table
from ..plots import png_of
from ..runs.files import atomic_write, json_bytes, load_json, write_json
from .cases import WHEN, read_cases
from .mean import Mean
from .metrics import METRICS
from .scores import summarise, values_of

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

COLUMNS = ("S", *(column for metric in METRICS for column in metric.columns))  # the papers' order

MAY_LACK = {"paraphrase_prompts": "PS, PM and PA", "neighborhood_prompts": "NS, NM and NA"}  # the columns of a sort


@dataclass
class Report:
    """cases: a dict a record in the published layout. settings: what was evaluated, and how. skipped: records left out,
    with the reason. records: what was asked, where it is at hand: cases do not hold the words of all prompts."""

    cases: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    records: Sequence[Mapping[str, Any]] = field(default=(), repr=False, compare=False)

    def summary(self, when: str = "post") -> dict[str, Mean]:
        """Column -> mean with standard error and n, times 100 (see `scores`); empty where there is no such side."""
        return summarise(self.cases, when)

    def rows(self) -> dict[str, dict[str, Mean]]:
        """The summaries there are: before the edit, after it."""
        summaries = {name: self.summary(when) for when, name in WHEN.items()}
        return {name: row for name, row in summaries.items() if row}

    def table(self) -> str:
        """Markdown, the papers' column order, standard errors in brackets; and what is not measured, of how many."""
        notes = [*self._not_asked(), *([f"{_records(len(self.skipped))} skipped."] if self.skipped else [])]
        return "\n\n".join([table(self.rows(), "model"), *notes]) + "\n"

    def _not_asked(self) -> list[str]:
        """Of records without prompts of a sort: their columns are means over the others."""
        last = "post" if any("post" in case for case in self.cases) else "pre"
        asked = [case[last] for case in self.cases if "rewrite_prompts_correct" in case.get(last, ())]
        without = {sort: sum(not case.get(f"{sort}_correct") for case in asked) for sort in MAY_LACK}
        rest = {True: "are of the others", False: "are empty"}
        return [
            f"{_records(count)} without {sort}: {MAY_LACK[sort]} {rest[count < len(asked)]}."
            for sort, count in without.items()
            if count
        ]

    def to_rows(self) -> list[dict[str, Any]]:
        """Tidy, one a case and side: case_id, when ("pre", "post"), relation_id, prompt, targets, and its columns."""
        tidy = []
        for case in self.cases:
            asked = {"relation_id": rewrites_of(case)[0].get("relation_id"), **asked_texts(case)}
            sides = [when for when in WHEN if when in case]
            tidy += [{"case_id": case["case_id"], "when": when, **asked, **values_of(case[when])} for when in sides]
        return tidy

    def to_pandas(self) -> pandas.DataFrame:
        """`to_rows` as a DataFrame (needs pandas)."""
        return frame(self.to_rows())

    def to_html(self, path: str | Path) -> None:
        """One self-contained page: means, records to sort, and their prompts (needs plotly and jinja2)."""
        from ..pages.page import write_page
        from ..pages.results import report_page

        write_page(path, report_page(self, self.records))

    def __repr__(self) -> str:
        return f"Report({len(self.cases)} cases, {', '.join(self.rows()) or 'nothing measured'})"

    def _repr_html_(self) -> str:
        """The table, in a notebook."""
        sides = self.rows()
        columns = [name for name in COLUMNS if any(name in row for row in sides.values())]
        rows = [[side, max(m.n for m in row.values()), *(_cell(row.get(name), name) for name in columns)]
                for side, row in sides.items()]  # fmt: skip
        caption = f"{_records(len(self.cases))}, {len(self.skipped)} skipped; times 100, standard errors in brackets"
        return html_table(caption, ["model", "n", *columns], rows)

    def _repr_png_(self) -> bytes | None:
        """Successes by relation, where a notebook takes no HTML."""
        return png_of(self.plot()) if self.cases else None

    def by_relation(self, when: str = "post") -> dict[str, dict[str, Mean]]:
        """Summary of each relation's records, the largest relation first (MEMIT, figure 6)."""
        groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for case in self.cases:
            groups[rewrites_of(case)[0].get("relation_id") or "?"].append(case)
        ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
        return {name: row for name, cases in ordered if (row := summarise(cases, when))}

    def worst(self, count: int = 10, when: str = "post") -> list[dict[str, Any]]:
        """The cases with the lowest mean of the columns that S is made of, with what was asked."""
        rows = []
        for case in self.cases:
            if when not in case:
                continue
            row = values_of(case[when])
            parts = [row[name] for name in ("ES", "PS", "NS") if name in row]
            parts = parts or [row[name] for name in ("EA", "PA", "NA") if name in row]
            if not parts:  # only generated text was measured
                continue
            rows.append(
                {
                    "case_id": case["case_id"],
                    "mean": sum(parts) / len(parts),
                    **asked_texts(case),
                    **row,
                }
            )
        return sorted(rows, key=lambda x: (x["mean"], isinstance(x["case_id"], str), x["case_id"]))[:count]

    def to_dict(self) -> dict[str, Any]:
        rows = {
            when: {k: v.to_dict() for k, v in self.summary(when).items()}
            for when in WHEN
            if any(when in c for c in self.cases)
        }
        last = "post" if "post" in rows else "pre"
        relations = {r: {k: v.to_dict() for k, v in row.items()} for r, row in self.by_relation(last).items()}
        return {
            "settings": self.settings,
            "cases": len(self.cases),
            "skipped": self.skipped,
            "summary": rows,
            "by_relation": relations,
            "worst": self.worst(when=last),
        }

    @typed
    def save(self, folder: str | Path) -> list[Path]:
        """report.json, report.md and relations.png, atomically."""
        folder = Path(folder)
        paths = [folder / "report.json", folder / "report.md", folder / "relations.png"]
        write_json(paths[0], self.to_dict())
        atomic_write(paths[1], lambda file: file.write(self.markdown().encode()))
        self.plot(paths[2])
        return paths

    def markdown(self) -> str:
        last = "post" if any("post" in case for case in self.cases) else "pre"
        parts = [
            self.table(),
            "\n## By relation\n\n",
            table(self.by_relation(last), "relation"),
            "\n\n## Worst cases\n\n",
        ]
        lines = ["| case | prompt | new | true | ES | PS | NS |", "|--:|---|---|---|--:|--:|--:|"]
        for x in self.worst(when=last):
            shown = [f"{x[k]:.0f}" if k in x else "" for k in ("ES", "PS", "NS")]
            texts = [
                str("" if x[k] is None else x[k]).replace("|", "\\|")
                for k in ("case_id", "prompt", "target_new", "target_true")
            ]
            lines.append(f"| {' | '.join(texts + shown)} |")
        return "".join(parts) + "\n".join(lines) + "\n"

    def plot(self, path: str | Path | None = None) -> Figure:
        """Efficacy, paraphrase and neighbourhood success of each relation (MEMIT, figure 6)."""
        from .plots import plot_relations

        last = "post" if any("post" in case for case in self.cases) else "pre"
        return plot_relations(self.by_relation(last), path)

    @classmethod
    @typed
    def load(cls, folder: str | Path) -> Report:
        """From an evaluation's folder (`cases/*.json`, or the published layout's *case_*.json in the folder itself).

        ValueError names the file, and the key in it, that is not what an evaluation writes (see `cases.read_cases`).
        """
        cases, path = read_cases(Path(folder)), Path(folder) / "report.json"
        kept = load_json(path) if path.exists() else {}
        settings, skipped = kept.get("settings", {}), kept.get("skipped", [])
        if not isinstance(settings, dict) or not isinstance(skipped, list):
            raise ValueError(f"'{path}' is no report: settings and skipped are not an object and a list")
        try:
            json_bytes([settings, skipped])
        except ValueError as error:
            raise ValueError(f"'{path}' is no report: it holds NaN or infinite numbers") from error
        return cls(cases, settings, skipped)


def table(rows: Mapping[str, Mapping[str, Mean]], name: str) -> str:
    """Markdown table of summaries; columns that no row has are left out."""
    columns = [c for c in COLUMNS if any(c in row for row in rows.values())]
    lines = [f"| {name} | n | {' | '.join(columns)} |", "|---|--:|" + "--:|" * len(columns)]
    for label, row in rows.items():
        shown = [_cell(row.get(column), column) for column in columns]
        n = max((mean.n for mean in row.values()), default=0)
        lines.append(f"| {label} | {n} | {' | '.join(shown)} |")
    return "\n".join(lines)


def side_by_side(reports: Mapping[str, Report]) -> str:
    """One table of many runs: the unedited model once for each that differs, then each run after its edit."""
    rows: dict[str, dict[str, Mean]] = {}
    for name, report in reports.items():
        pre, post = report.summary("pre"), report.summary("post")
        if pre and pre not in rows.values():
            rows["unedited" if "unedited" not in rows else f"unedited ({name})"] = pre
        if post:
            rows[name] = post
    return table(rows, "method") + "\n"


def _records(count: int) -> str:
    return f"{count} record{'s' if count != 1 else ''}"


def _cell(mean: Mean | None, column: str) -> str:
    if mean is None:
        return ""
    error = "" if mean.stderr is None else f" ({mean.stderr:.1f})"
    return f"{mean.mean:.1f}{error}"
