"""What a study found: tidy rows, as JSON, CSV, a table and figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import typed
from ..evaluation.scores import summary_of
from ..frames import frame
from ..plots import finish
from ..runs.files import atomic_write, load_json, write_json

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

HALF = "_half"  # behind a column's name: half the width of its 95 % interval
NORMAL = 1.96


@dataclass
class Findings:
    """rows: a dict each; of a mean over facts also half the width of its 95 % interval ("ES", "ES_half"; None for a
    single fact). settings: what was asked. keys: columns that tell rows apart. figures: by file name, of the findings.
    notes: lines below the table.
    """

    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    keys: tuple[str, ...]
    figures: Mapping[str, Callable[[Findings], Figure]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def columns(self) -> list[str]:
        """Of the rows, in their order, the keys first."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        return [name for name in self.keys if name in names] + [name for name in names if name not in self.keys]

    def chosen(self, **wanted: Any) -> list[dict[str, Any]]:
        """Rows with these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]

    def names(self, column: str) -> list[Any]:
        """The values of a column, in the order of the rows."""
        return list(dict.fromkeys(row[column] for row in self.rows if row.get(column) is not None))

    def table(self) -> str:
        """Markdown: a line a row, means with the half width of their 95 % interval."""
        shown = [name for name in self.columns() if not name.endswith(HALF)]
        lines = [f"| {' | '.join(shown)} |", "|" + "".join("---|" if n in self.keys else "--:|" for n in shown)]
        for row in self.rows:
            lines.append(f"| {' | '.join(_cell(row.get(name), row.get(name + HALF)) for name in shown)} |")
        return "\n".join(lines + ([""] + self.notes if self.notes else [])) + "\n"

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a DataFrame (needs pandas)."""
        return frame(self.rows)

    def to_html(self, path: str | Path) -> None:
        """One self-contained page: a chart a measure, and the rows (needs plotly and jinja2)."""
        from ..pages.page import write_page
        from ..pages.study import study_page

        write_page(path, study_page(self._title(), self.rows, self.keys, self.settings, "\n".join(self.notes)))

    def _title(self) -> str:
        return f"Study: {self.settings['run'].replace('_', ' ')}" if "run" in self.settings else "Study"

    def _repr_markdown_(self) -> str:
        """The table, in a notebook."""
        return self.table()

    @typed
    def plot(self, folder: str | Path, formats: Sequence[str] = ("png", "pdf")) -> list[Path]:
        """Every figure in every format; none where there is nothing to show."""
        paths = []
        for name, draw in self.figures.items() if self.rows else ():
            figure = draw(self)
            for suffix in formats:
                paths.append(Path(folder) / f"{name}.{suffix}")
                finish(figure, paths[-1])
        return paths

    def to_dict(self) -> dict[str, Any]:
        return {"settings": self.settings, "rows": self.rows, "notes": self.notes}

    @typed
    def save(self, folder: str | Path) -> None:
        """study.json, .csv, .md and the figures, atomically."""
        folder = Path(folder)
        write_json(folder / "study.json", self.to_dict())
        write_csv(folder / "study.csv", self.columns(), self.rows)
        atomic_write(folder / "study.md", lambda file: file.write(self.table().encode()))
        self.plot(folder)

    @staticmethod
    def read(folder: str | Path) -> dict[str, Any]:
        """What `save` wrote: settings, rows and notes."""
        return load_json(Path(folder) / "study.json")


def means_of(values: Iterable[Mapping[str, float]]) -> dict[str, Any]:
    """Of cases' columns (see `evaluation.scores`): each column's mean and half the width of its 95 % interval."""
    row: dict[str, Any] = {}
    for column, mean in summary_of(list(values)).items():
        row[column] = mean.mean
        row[column + HALF] = None if mean.stderr is None else NORMAL * mean.stderr
    return row


def write_csv(path: str | Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    atomic_write(path, lambda file: file.write(csv_text(columns, rows).encode()))


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cell(value: Any, half: float | None) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value).replace("|", "\\|")
    return f"{value:.3g}" + ("" if half is None else f" ± {half:.2g}")
