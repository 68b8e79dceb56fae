"""Pages: what stands on them are the data, nothing of them asks the network, and odd texts stay texts."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import knowedit_ext as ke
from knowedit_ext.pages.page import Page, Table, rendered, write_page
from knowedit_ext.pages.results import effects_page, report_page, trace_page

pytest.importorskip("plotly", reason="the extra html is not installed")
pytest.importorskip("jinja2", reason="the extra html is not installed")

MODEL = ke.load_model("world")
RECORDS = ke.world_records()[:3]
FACT = ke.Fact(RECORDS[0]["requested_rewrite"]["prompt"], RECORDS[0]["requested_rewrite"]["subject"])
TRACES = {kind: ke.trace(MODEL, FACT, kind, samples=3) for kind in ("state", "mlp")}
REPORT = ke.evaluate(MODEL, RECORDS, generation=False)
PAGES = {
    **{f"trace {kind}": trace_page(trace) for kind, trace in TRACES.items()},
    "effects": effects_page(ke.Effects.from_traces(TRACES.values())),
    "report": report_page(REPORT),
}


class Read(HTMLParser):
    """Tables by caption: rows of texts; addresses; what stands in scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables, self.addresses, self.scripts, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.open.append(tag) if tag not in ("meta",) else None
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag  # whatever texts hold, the page stays well-formed

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_for_nothing_and_has_its_numbers(name: str, tmp_path: Path) -> None:
    page = PAGES[name]
    write_page(tmp_path / "page.html", page)
    text = (tmp_path / "page.html").read_text()
    read = Read(text)
    assert not read.addresses and "default-src 'none'" in text and "@import" not in text
    tables = [*page.tables, *(table for record in page.records for table in record.tables)]
    assert len(tables) == len(read.tables)
    for table, (head, *rows) in zip(tables, read.tables, strict=True):
        assert head == list(table.columns) and len(rows) == len(table.rows)
        for wanted, row in zip(table.rows, rows, strict=True):
            said = ["" if x is None else f"{x:.3f}" if isinstance(x, float) else str(x) for x in wanted]
            assert row == said
    charts = json.loads(read.scripts[0])
    assert [chart["data"][0]["type"] for chart in charts] == [chart.traces[0]["type"] for chart in page.charts]


def test_the_map_and_its_samples() -> None:
    trace = TRACES["state"]
    [chart] = PAGES["trace state"].charts
    assert chart.traces[0]["z"] == trace.scores.tolist()
    said = chart.traces[0]["customdata"][1][2]
    assert [float(x) for x in said.partition("noise samples ")[2].split(",")] == pytest.approx(
        trace.sample_scores[:, 1, 2].tolist(), abs=6e-4
    )
    assert chart.traces[0]["zmin"] + chart.traces[0]["zmax"] == pytest.approx(2 * trace.low_score)


def test_the_probabilities_of_a_record() -> None:
    [table] = PAGES["report"].records[0].tables
    nll = REPORT.cases[0]["pre"]["rewrite_prompts_probs"][0]
    assert table.rows[0] == ["rewrite 0", math.exp(-nll["target_new"]), math.exp(-nll["target_true"])]


def test_texts_are_no_markup() -> None:
    odd = "</script><script>alert(1)</script><b>&'\""
    trace = replace(TRACES["state"], tokens=[odd, *TRACES["state"].tokens[1:]])
    read = Read(rendered(trace_page(trace)))
    assert len(read.scripts) == 3 and read.tables[0][1][0] == f"0 {odd}"
    assert json.loads(read.scripts[0])[0]["data"][0]["y"][0] == f"0 {odd}"
    assert Read(rendered(Page(odd, odd, tables=[Table(odd, ["a"], [[odd]])]))).tables == [[["a"], [odd]]]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to read scripts by")
def test_the_script_is_one(tmp_path: Path) -> None:
    script = Read(rendered(PAGES["report"])).scripts[-1]
    (tmp_path / "page.js").write_text(script)
    assert subprocess.run(["node", "--check", str(tmp_path / "page.js")]).returncode == 0
    (tmp_path / "broken.js").write_text(script.replace("{", "", 1))
    assert subprocess.run(["node", "--check", str(tmp_path / "broken.js")], capture_output=True).returncode


def test_other_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a page is written as .html"):
        TRACES["state"].to_html(tmp_path / "x.pdf")
    assert not list(tmp_path.iterdir())


def test_in_a_browser(tmp_path: Path) -> None:
    """The chart is drawn with the data, a click shows a cell's samples, a column sorts; no error, no request."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright")
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        pytest.skip("no chromium")
    TRACES["state"].to_html(tmp_path / "trace.html")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page, errors, requests = browser.new_page(), [], []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((tmp_path / "trace.html").as_uri())
        assert page.evaluate("document.getElementById('chart0').data[0].z") == TRACES["state"].scores.tolist()
        page.locator("#chart0 .nsewdrag").click()
        assert "noise samples" in page.locator("#chosen0").inner_text()
        page.get_by_role("button", name="layer 3").click()
        shown = [float(x) for x in page.locator("tbody tr td:nth-child(5)").all_inner_texts()]
        assert shown == sorted(shown)
        browser.close()
    assert not errors and all(re.match("file:|data:|blob:", url) for url in requests)
