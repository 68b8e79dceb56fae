"""Pages in a real browser: what is drawn equals the data, everything can be reached, no error, no request leaves."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly", reason="the extra html is not installed")
pytest.importorskip("jinja2", reason="the extra html is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no chromium", allow_module_level=True)

from knowedit_ext.pages.page import Page, write_page  # noqa: E402
from knowedit_ext.pages.results import trace_page  # noqa: E402

from .support.pages import FACT, PAGES, RECORDS, TRACES  # noqa: E402

PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "color_scheme": "dark"}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(chromium: Any, path: Path, page: Page, **kind: Any) -> Iterator[Any]:
    """The page in the browser; afterwards: no error, no warning, and no request left it."""
    write_page(path, page)
    context = chromium.new_context(**kind)
    tab, errors, requests = context.new_page(), [], []
    tab.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(path.as_uri())
    yield tab
    context.close()
    assert not errors
    assert requests and all(re.match("file:|data:|blob:", url) for url in requests)


@pytest.mark.parametrize("kind", [{}, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("name", PAGES)
def test_every_chart_is_drawn_with_its_data(chromium: Any, tmp_path: Path, name: str, kind: dict[str, Any]) -> None:
    page = PAGES[name]
    with opened(chromium, tmp_path / "page.html", page, **kind) as tab:
        for n, chart in enumerate(page.charts):
            if len(page.charts) > 1:
                tab.get_by_label(page.switch, exact=True).select_option(str(n))
            seen = [view.is_visible() for view in tab.locator(".view").all()]
            assert seen == [k == n for k in range(len(page.charts))]
            drawn = tab.evaluate(f"document.getElementById('chart{n}').data.map((t) => ({{z: t.z, x: t.x, y: t.y}}))")
            for given, wanted in zip(drawn, chart.traces, strict=True):
                assert all(given[axis] == wanted[axis] for axis in "xyz" if axis in wanted)
            assert tab.locator(f"#chart{n} .main-svg").first.is_visible()
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # nothing sticks out
        if kind:
            assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 22)"


def test_cells_are_told_by_click_hover_and_keys(chromium: Any, tmp_path: Path) -> None:
    cells = PAGES["traces"].charts[0].traces[0]["customdata"]
    with opened(chromium, tmp_path / "page.html", PAGES["traces"]) as tab:
        chosen = tab.locator("#chosen0")
        tab.locator("#chart0 .nsewdrag").click()
        assert chosen.inner_text() in [cell for row in cells for cell in row]
        assert "layer" in tab.locator("#chart0 .hoverlayer").text_content()
        tab.locator("#chart0").focus()
        for keys, cell in (
            ("ArrowDown", cells[1][0]),
            ("ArrowRight ArrowRight", cells[1][2]),
            ("ArrowUp", cells[0][2]),
        ):
            for key in keys.split():
                tab.keyboard.press(key)
            assert chosen.inner_text() == cell
        for _ in range(20):
            tab.keyboard.press("ArrowLeft")
        assert chosen.inner_text() == cells[0][0]
        assert chosen.get_attribute("aria-live") == "polite"


def test_rows_are_sorted_filtered_and_opened(chromium: Any, tmp_path: Path) -> None:
    page = PAGES["report"]
    table = page.tables[1]
    many = replace(table, rows=list(table.rows) * 4, opens=list(table.opens) * 4)  # enough for a filter
    column = many.columns.index("EM")
    with opened(chromium, tmp_path / "page.html", replace(page, tables=[many])) as tab:
        head = tab.locator("main > .wide th").nth(column)
        shown = tab.locator(f"main > .wide tbody tr td:nth-child({column + 1})")
        for way in ("ascending", "descending"):
            head.get_by_role("button").press("Enter")
            assert head.get_attribute("aria-sort") == way
            values = [float(x) for x in shown.all_inner_texts()]
            assert values == sorted(values, reverse=way == "descending") and len(set(values)) > 1
        tab.get_by_label("Only rows with").fill(FACT.text)
        rows = [row for row in tab.locator("main > .wide tbody tr").all() if row.is_visible()]
        assert len(rows) == 8 and all(FACT.text in row.inner_text() for row in rows)
        inside = tab.locator("#record0 table")
        assert not inside.is_visible()
        rows[0].get_by_role("link").click()
        assert inside.is_visible() and RECORDS[0]["paraphrase_prompts"][0] in inside.inner_text()


def test_tokens_that_look_like_tags_are_seen(chromium: Any, tmp_path: Path) -> None:
    odd = replace(TRACES["state"], tokens=["<b>&lt;$x$", *TRACES["state"].tokens[1:]])
    with opened(chromium, tmp_path / "page.html", trace_page([odd])) as tab:
        assert "0 <b>&lt;$x$*" in tab.locator("#chart0 .yaxislayer-above").text_content()
