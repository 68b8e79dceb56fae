"""One self-contained page: charts by Plotly, whose script is in the file, and the same numbers as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..extras import require
from ..runs.interrupts import imported

FEW = 20  # rows that need no filter


@dataclass(frozen=True)
class Measured:
    """A number, and half the width of its interval."""

    value: float
    half: float


@dataclass(frozen=True)
class Table:
    """The first column names the row. Numbers are shown to three or four digits, and sorted by their value.

    opens: for each row the number of the page's record that its name opens.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    opens: Sequence[int] = ()

    @property
    def texts(self) -> set[int]:
        """Which columns hold texts."""
        return {n for row in self.rows for n, value in enumerate(row) if isinstance(value, str)}

    @property
    def filtered(self) -> bool:
        return len(self.rows) > FEW


@dataclass(frozen=True)
class Chart:
    """title: what it shows. traces, layout: Plotly's; `customdata` of a point is the text that a click on it shows.

    tables: its numbers. rows: lines of text beside it, for which it is to be made higher.
    """

    title: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    tables: Sequence[Table] = ()
    rows: int = 0


@dataclass(frozen=True)
class Record:
    """What a page opens on request: a line of it, and the tables inside."""

    title: str
    tables: Sequence[Table]
    text: str = ""


@dataclass(frozen=True)
class Page:
    """charts: one is seen at a time, and `switch` names what is chosen among them."""

    title: str
    lead: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    records: Sequence[Record] = field(default=())
    switch: str = "Show"


def write_page(path: str | Path, page: Page) -> None:
    """The page as one .html file, atomically. `MissingExtraError` where Plotly or Jinja2 is not installed."""
    from ..runs.files import atomic_write  # with torch; `check_name` is asked before it is needed

    check_name(path)
    text = rendered(page)
    atomic_write(path, lambda file: file.write(text.encode()))


def check_name(path: str | Path) -> None:
    """ValueError for a name that is not a page's, `MissingExtraError` where none can be made: before the work."""
    if Path(path).suffix not in (".html", ".htm"):
        raise ValueError(f"'{path}': a page is written as .html")
    require("plotly")
    require("jinja2")


def rendered(page: Page) -> str:
    require("plotly")
    require("jinja2")
    jinja2, plotly, figures = (imported(name) for name in ("jinja2", "plotly.offline", "plotly.graph_objects"))
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=jinja2.FileSystemLoader(folder)
    )
    environment.filters |= {"shown": shown, "number": _number}
    template = environment.get_template("page.html.j2")
    charts = [json.loads(figures.Figure(chart.traces, chart.layout).to_json()) for chart in page.charts]
    script = plotly.get_plotlyjs() if charts else ""
    return template.render(page=page, charts=charts, script=script)


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Measured):
        return f"{shown(value.value)} ± {shown(value.half)}"
    if not isinstance(value, float):
        return str(value)
    if 0 < abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:.{3 - (abs(value) >= 9.9995) - (abs(value) >= 99.995)}f}"


def _number(value: Any) -> float | int | None:
    """What a cell is sorted by."""
    value = value.value if isinstance(value, Measured) else value
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
