"""What the study of localization found: one tidy table, what explains its scores, figures, one page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import typed
from ..evaluation.problem_scores import KINDS, problem_scores
from ..runs.files import atomic_write, load_json, write_json
from .findings import write_csv
from .regression import regress

METRICS = (*KINDS, "overall")
COLUMNS = (
    *("case_id", "prompt", "subject", "target", "method", "window", "problem", "layer", "null"),
    *("effect", "subject_effect", "peak"),
    *(f"{when}_{kind}" for when in ("before", "after") for kind in (*KINDS, "essence")),
    *(*METRICS, "harmonic", "essence", "overall_essence"),
)


@dataclass
class Localization:
    """rows: one an edit, see `COLUMNS` (before_*, after_*: p(target), of essence perplexities; then scores).
    effects: [facts, layers]. regressions: one for each method, problem and score, over all layers and ("null":
    False) without the edits that could change nothing. left_out: facts that a problem could not be asked of.
    """

    rows: list[dict[str, Any]]
    effects: np.ndarray
    settings: dict[str, Any]
    left_out: list[dict[str, Any]]
    regressions: list[dict[str, Any]]

    @classmethod
    def of(
        cls,
        measured: Iterable[Mapping[str, Any]],
        effects: np.ndarray,
        settings: dict[str, Any],
        left_out: list[dict[str, Any]],
    ) -> Localization:
        """measured: rows with "before" and "after", what the model gave the target."""
        rows = [_scored(row) for row in measured]
        return cls(rows, effects, settings, left_out, _regressions(rows))

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*METRICS, "essence", "overall_essence") if "essence" in self.rows[0] else METRICS

    def chosen(self, **wanted: Any) -> list[dict[str, Any]]:
        """Rows with these values."""
        return [row for row in self.rows if all(row[name] == value for name, value in wanted.items())]

    def names(self, column: str) -> list[Any]:
        """The values of a column, in the order of the rows."""
        return list(dict.fromkeys(row[column] for row in self.rows))

    def means(self) -> list[dict[str, Any]]:
        """n, mean and standard deviation of every score by problem, method and layer (the paper's table)."""
        summaries = []
        for problem in self.names("problem"):
            for method in self.names("method"):
                for layer in sorted(self.names("layer")):
                    rows = self.chosen(problem=problem, method=method, layer=layer)
                    if rows:
                        summary = {"problem": problem, "method": method, "layer": layer, "n": len(rows)}
                        for metric in self.metrics:
                            values = np.array([row[metric] for row in rows])
                            summary[metric] = float(values.mean())
                            summary[f"{metric}_sd"] = float(values.std(ddof=1)) if len(values) > 1 else None
                        summaries.append(summary)
        return summaries

    def table(self, metric: str = "rewrite") -> str:
        """Markdown: what explains a score, by problem and method."""
        lines = [
            "| problem | method | n | layer | effect | both | gain | F | p | no null edits: layer | effect | gain |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for whole in self.regressions:
            if whole["metric"] != metric or not whole["null"]:
                continue
            (part,) = (
                r
                for r in self.regressions
                if not r["null"] and all(r[k] == whole[k] for k in ("problem", "method", "metric"))
            )
            shown = [whole["r2_layer"], whole["r2_trace"], whole["r2_both"], whole["gain"], whole["f"], whole["p"]]
            shown += [part["r2_layer"], part["r2_trace"], part["gain"]]
            cells = " | ".join("" if value is None else f"{value:.3f}" for value in shown)
            lines.append(f"| {whole['problem']} | {whole['method']} | {whole['n']} | {cells} |")
        return "\n".join(lines) + "\n"

    @typed
    def plot(self, folder: str | Path, formats: Sequence[str] = ("png", "pdf")) -> list[Path]:
        """The paper's figures, each in every format."""
        from .localization_plots import plot_all

        return plot_all(self, Path(folder), formats)

    def lead(self) -> str:
        """How much was measured, in a line."""
        text = f"{len(self.effects)} facts, {len(self.rows)} edits, of which {len(self.chosen(null=True))} null."
        if self.left_out:
            text += f" {len(self.left_out)} problems could not be asked: {self.left_out[0]['reason']}"
        return text

    def to_html(self, path: str | Path) -> None:
        """One self-contained page: mean scores by layer, problem and method, and what explains the scores (needs plotly
        and jinja2)."""
        from ..pages.page import write_page
        from .localization_page import localization_page

        write_page(path, localization_page(self))

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "left_out": self.left_out,
            "effects": self.effects.tolist(),
            "rows": self.rows,
        }

    @typed
    def save(self, folder: str | Path) -> None:
        """table.json, table.csv, means.csv, regressions.json, regressions.csv, study.md and figures."""
        folder = Path(folder)
        write_json(folder / "table.json", self.to_dict())
        write_json(folder / "regressions.json", {"regressions": self.regressions})
        write_csv(folder / "table.csv", [name for name in COLUMNS if name in self.rows[0]], self.rows)
        means = self.means()
        write_csv(folder / "means.csv", list(means[0]), means)
        flat = [{k: v for k, v in r.items() if k != "correlation"} for r in self.regressions]
        for row, whole in zip(flat, self.regressions, strict=True):
            row |= {f"correlation_{layer}": value for layer, value in (whole["correlation"] or {}).items()}
        columns = list(dict.fromkeys(name for row in flat for name in row))
        write_csv(folder / "regressions.csv", columns, flat)
        self.plot(folder / "figures")
        text = f"{self.lead()}\n\n{self.table()}"
        atomic_write(folder / "study.md", lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, folder: str | Path) -> Localization:
        """From a study's folder."""
        kept = load_json(Path(folder) / "table.json")
        rows = kept["rows"]
        return cls(rows, np.array(kept["effects"]), kept["settings"], kept["left_out"], _regressions(rows))


def _scored(row: Mapping[str, Any]) -> dict[str, Any]:
    before, after = row["before"], row["after"]
    names = [name for name in (*KINDS, "essence") if name in before]
    sides = {f"{when}_{name}": side[name] for when, side in (("before", before), ("after", after)) for name in names}
    kept = {name: value for name, value in row.items() if name not in ("before", "after")}
    return kept | sides | problem_scores(row["problem"], before, after)


def _regressions(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    metrics = [name for name in (*METRICS, "essence", "overall_essence") if name in rows[0]]
    by_edit: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        by_edit.setdefault((row["problem"], row["method"]), []).append(row)
    return [
        {"problem": problem, "method": method, "metric": metric, "null": null} | _explained(part, metric, null)
        for (problem, method), part in by_edit.items()
        for metric in metrics
        for null in (True, False)
    ]


def _explained(rows: Sequence[Mapping[str, Any]], metric: str, null: bool) -> dict[str, Any]:
    """null: with the edits that changed nothing. All None where the scores are all the same."""
    rows = [row for row in rows if null or not row["null"]]
    try:
        return regress(
            [row[metric] for row in rows], [row["layer"] for row in rows], [row["effect"] for row in rows]
        ).to_dict()
    except ValueError:
        names = ("r2_layer", "r2_trace", "r2_both", "gain", "f", "p", "df", "correlation")
        return {"n": len(rows)} | dict.fromkeys(names)
