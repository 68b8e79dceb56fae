"""What a study of sequential edits found: tidy rows, a table of where it ended, and the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import typed
from ..plots import figure_of, finish
from ..runs.files import atomic_write, write_json
from .ability import ERROR
from .cells import Cell
from .findings import HALF, csv_text
from .plots import legend, line, log_scale, named
from .spread import Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# column of the rows: (group, measure) of a look, title in the figure, how it reads in tables
COLUMNS = {
    "rewrite": ("all", "EA", "all edits so far: said, %"),
    "rewrite preferred": ("all", "ES", "all edits so far: preferred, %"),
    "paraphrase": ("all", "PS", "paraphrases preferred, %"),
    "neighbourhood": ("all", "NS", "neighbourhood kept, %"),
    "first": ("first", "EA", "first edits: said, %"),
    "first preferred": ("first", "ES", "first edits: preferred, %"),
    "untouched": ("untouched", "EA", "untouched facts: said, %"),
    "untouched preferred": ("untouched", "ES", "untouched facts: preferred, %"),
    "perplexity": (None, "perplexity", "perplexity"),
    "growth": (None, "growth", "|W - W0| / |W0|, largest"),
}
PANELS = ("rewrite", "first", "neighbourhood", "untouched", "perplexity", "growth")
_LOG = ("perplexity", "growth")


@dataclass
class Sequential:
    """rows: a dict a method, seed and look. ended: sequences that broke, {"method", "seed", "edits", "why"}.

    settings: what was asked. A row's shares are in %; "said": every token of the new object (untouched: of the true
    one) is the most probable one; "preferred": likelier than the other object.
    """

    rows: list[dict[str, Any]]
    ended: list[dict[str, Any]]
    settings: dict[str, Any]

    @classmethod
    def of(cls, results: Sequence[tuple[Cell, Mapping[str, Any]]], settings: Mapping[str, Any]) -> Sequential:
        rows, ended = [], []
        for cell, result in results:
            where = {name: cell.key[name] for name in ("method", "seed")}
            rows += [where | _row(look) for look in result["looks"]]
            if result["ended"] is not None:
                ended.append(where | result["ended"])
        return cls(rows, ended, dict(settings))

    def methods(self) -> list[str]:
        return list(dict.fromkeys(row["method"] for row in self.rows))

    def columns(self) -> list[str]:
        """`COLUMNS`, and one for each metric of a task."""
        return [*COLUMNS, *dict.fromkeys(name for row in self.rows for name in row.get("tasks", {}))]

    def at(self, method: str, column: str) -> dict[int, Spread]:
        """{edits: mean over seeds}, for the looks that have the column."""
        values: dict[int, list[float]] = {}
        for row in self.rows:
            value = _flat(row).get(column)
            if row["method"] == method and value is not None:
                values.setdefault(row["edits"], []).append(value)
        return {edits: Spread.of(seeds) for edits, seeds in sorted(values.items())}

    def difference(self, method: str, other: str, column: str, edits: int) -> Spread:
        """method - other after so many edits, of the seeds that both have: they met the same facts.

        Raises ValueError where there is none.
        """
        by_seed = [
            {row["seed"]: _flat(row)[column] for row in self.rows if row["method"] == name and row["edits"] == edits}
            for name in (method, other)
        ]
        both = [by_seed[0][seed] - by_seed[1][seed] for seed in by_seed[0] if seed in by_seed[1]]
        if not both:
            raise ValueError(f"no seed has '{column}' of both '{method}' and '{other}' after {edits} edits")
        return Spread.of(both)

    def table(self) -> str:
        """Markdown: each method after its last edit, means over seeds with the half width of their 95 % interval."""
        columns = [name for name in self.columns() if any(_flat(row).get(name) is not None for row in self.rows)]
        lines = [f"| method | seeds | edits | {' | '.join(columns)} |", "|---|--:|--:|" + "--:|" * len(columns)]
        for method in self.methods():
            looks = self.at(method, "rewrite")
            shown = []
            for name in columns:
                by_edits = self.at(method, name)
                shown.append(by_edits[max(by_edits)].text() if by_edits else "")
            last = max(looks)
            lines.append(f"| {method} | {looks[last].n} | {last} | {' | '.join(shown)} |")
        broken = [f"{x['method']}, seed {x['seed']}: ended after {x['edits']} edits: {x['why']}" for x in self.ended]
        return "\n".join(lines + ([""] + broken if broken else [])) + "\n"

    def csv(self) -> str:
        """A line a row; the growth of single weights is in the JSON alone."""
        return csv_text(("method", "seed", "edits", *self.columns()), map(_flat, self.rows))

    def plot(self, path: str | Path | None = None) -> Figure:
        """A panel a measure, a line a method: the mean over seeds, and from the least to the largest of them."""
        figure = figure_of(11.0, 6.0)
        axes = figure.subplots(2, 3, sharex=True).flatten()
        for panel, name in zip(axes, PANELS, strict=True):
            for number, method in enumerate(self.methods()):
                looks = {edits: x for edits, x in self.at(method, name).items() if edits or name not in ("growth",)}
                if name in ("rewrite", "first"):
                    looks.pop(0, None)
                if looks:
                    band = [[getattr(s, side) for s in looks.values()] for side in ("least", "most")]
                    line(panel, list(looks), [s.mean for s in looks.values()], number, method, band, shade=0.12)
            named(panel, None, None, COLUMNS[name][2])
            if name in _LOG:
                log_scale(panel.yaxis)
            else:
                panel.set_ylim(-3, 103)
        for panel in axes[3:]:
            named(panel, "edits")
        legend(figure)
        return finish(figure, path)

    def to_html(self, path: str | Path) -> None:
        """One self-contained page: a chart a measure, means over seeds with 95 % intervals (needs plotly, jinja2)."""
        from ..pages.page import write_page
        from ..pages.study import study_page

        rows: dict[tuple[str, int], dict[str, Any]] = {}
        for method in self.methods():
            for name in self.columns():
                for edits, seeds in self.at(method, name).items():
                    row = rows.setdefault((method, edits), {"method": method, "edits": edits, "seeds": seeds.n})
                    row |= {name: seeds.mean, name + HALF: seeds.half_width}
        labels = {name: title for name, (*_, title) in COLUMNS.items()}
        write_page(
            path, study_page("Edits, one after the other", list(rows.values()), ("method",), self.settings, "", labels)
        )

    def to_dict(self) -> dict[str, Any]:
        return {"settings": self.settings, "rows": self.rows, "ended": self.ended}

    @typed
    def save(self, folder: str | Path) -> list[Path]:
        """study.json, .csv, .md and .png, atomically."""
        paths = [Path(folder) / f"study.{suffix}" for suffix in ("json", "csv", "md", "png")]
        write_json(paths[0], self.to_dict())
        for path, content in ((paths[1], self.csv()), (paths[2], self.table())):
            atomic_write(path, lambda file, content=content: file.write(content.encode()))
        self.plot(paths[3])
        return paths


def _row(look: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"edits": look["edits"]}
    for name, (group, measure, _) in COLUMNS.items():
        value = look.get(group, {}).get(measure) if group else look.get(measure)
        row[name] = max(value.values(), default=0.0) if isinstance(value, Mapping) else value
    row["growth of"] = look["growth"]
    if "tasks" in look:
        scores = ((task, name, x) for task, metrics in look["tasks"].items() for name, x in metrics.items())
        row["tasks"] = {f"{task} {name}": x for task, name, x in scores if ERROR not in name}
    return row


def _flat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """With a column for each metric of a task."""
    return row | row.get("tasks", {})
