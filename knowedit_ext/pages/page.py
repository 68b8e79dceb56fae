"""One self-contained page: charts by Plotly, whose script is in the file, and the same numbers as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..extras import require
from ..runs.files import atomic_write
from ..runs.interrupts import imported


@dataclass(frozen=True)
class Chart:
    """title: what it shows. traces, layout: Plotly's; `customdata` of a point is the text that a click on it shows."""

    title: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """The first column names the row. Numbers are shown to three digits, and sorted by their value."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Record:
    """What a page opens on request: a line of it, and the tables inside."""

    title: str
    tables: Sequence[Table]


@dataclass(frozen=True)
class Page:
    title: str
    lead: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    records: Sequence[Record] = field(default=())


def write_page(path: str | Path, page: Page) -> None:
    """The page as one .html file, atomically. `MissingExtraError` where Plotly or Jinja2 is not installed."""
    if Path(path).suffix not in (".html", ".htm"):
        raise ValueError(f"'{path}': a page is written as .html")
    text = rendered(page)
    atomic_write(path, lambda file: file.write(text.encode()))


def rendered(page: Page) -> str:
    require("plotly")
    require("jinja2")
    jinja2, plotly, figures = (imported(name) for name in ("jinja2", "plotly.offline", "plotly.graph_objects"))
    template = (Path(__file__).parent / "page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    charts = [json.loads(figures.Figure(chart.traces, chart.layout).to_json()) for chart in page.charts]
    script = plotly.get_plotlyjs() if charts else ""
    return environment.from_string(template).render(page=page, charts=charts, script=script)


def shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
