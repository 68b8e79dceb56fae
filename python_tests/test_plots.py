"""Figures: widths of papers, one signed scale, the prompt in the title, letters that are there; and notebooks."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import knowedit_ext as ke
from knowedit_ext import plots
from knowedit_ext.evaluation.before_after import BeforeAfter, Said
from knowedit_ext.notebook import html_table, shades
from knowedit_ext.plots import COLUMN, PAGE, figure_of, finish
from knowedit_ext.studies.attention import heads
from knowedit_ext.studies.findings import Findings
from knowedit_ext.studies.results import Sequential
from knowedit_ext.studies.suggestion import Suggestion
from knowedit_ext.tracing import Trace

TOKENS = ["The", " Space", " Need", "le", " is", " in"]
SCORES = np.random.default_rng(0).uniform(0, 1, (6, 4)).astype(np.float32)
TRACE = Trace(SCORES, 0.4, 0.9, " Seattle", (5,), TOKENS, np.arange(6), (1, 4))
SAID = BeforeAfter(
    ["It is", "So is"],
    [Said([(" a", 0.5), (" b", 0.25)], " a"), Said([(" c", 1.0)], " c")],
    [Said([(" b", 0.75), (" a", 0.125)], " b", {" b": 0.75}), Said([(" d", 0.5)], " d")],
)


def test_figures_fit_a_page_and_begin_with_a_column() -> None:
    assert TRACE.plot().get_figwidth() == COLUMN
    wide = replace(TRACE, scores=np.zeros((6, 300), np.float32))
    assert wide.plot().get_figwidth() == PAGE == figure_of(100, 2).get_figwidth()
    effects = ke.Effects.from_traces([TRACE])
    assert effects.plot().get_figwidth() == COLUMN
    both = ke.Effects.from_traces([TRACE, replace(TRACE, kind="mlp")])
    assert both.plot().get_figwidth() == PAGE


def test_the_title_says_the_prompt() -> None:
    title = TRACE.plot().axes[0].get_title()
    assert "The Space Needle is in → Seattle" in title.replace("\n", " ") and "state" in title
    long = replace(TRACE, tokens=["word " * 20] * 6)
    assert max(map(len, long.plot().axes[0].get_title().split("\n"))) < 45


def test_a_figure_shows_itself_without_pyplot() -> None:
    figure = TRACE.plot()
    assert figure._repr_png_().startswith(b"\x89PNG") and isinstance(figure, matplotlib.figure.Figure)
    assert figure._repr_png_() == figure._repr_png_()


def test_letters_come_from_a_font_that_has_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"
    usual = plots._has(str(fonts / "DejaVuSans.ttf"))
    other = fonts / "DejaVuSerif.ttf"
    letter = chr(min(plots._has(str(other)) - usual))
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    found = [str(tmp_path / "broken.ttf"), str(other)]
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda *_, **__: found)
    plots._fonts_for.cache_clear()
    figure = figure_of(3, 2)
    figure.add_subplot().set_yticks([0.5], [f"x{letter}"])
    figure.axes[0].set_title("plain")
    finish(figure, None)
    plots._fonts_for.cache_clear()
    family = matplotlib.font_manager.get_font(str(other)).family_name
    assert family in figure.axes[0].get_yticklabels()[0].get_fontfamily()
    assert figure.axes[0].title.get_fontfamily() == ["sans-serif"]


def test_changes_of_heads_have_one_signed_scale() -> None:
    change = {"rome": 0.1, "memit": -0.4}
    rows = [
        {"method": m, "layer": layer, "head": head}
        | {f"{n}_before": 0.5 for n in ("attention", "value_norm")}
        | {f"{n}_change": change[m] for n in ("attention", "value_norm")}
        for m in change
        for layer in range(2)
        for head in range(2)
    ]
    panels = heads(Findings(rows, {}, ("method",))).axes
    limits = {axes.collections[0].get_clim() for axes in panels if "change" in axes.get_title()}
    assert limits == {(-0.4, 0.4)}


def test_bars_of_before_and_after() -> None:
    panels = [axes for axes in SAID.plot().axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == SAID.prompts
    before, after = panels[0].containers
    assert [bar.get_width() for bar in before] == [0.5, 0.25] and [bar.get_width() for bar in after] == [0.125, 0.75]
    assert all(abs(b.get_y() - a.get_y()) < 0.5 for b, a in zip(before, after, strict=True))  # beside each other


class Cells(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows, self.styles, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
            self.styles.append(dict(attributes).get("style", ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_results_show_themselves_in_a_notebook() -> None:
    head, *rows = Cells(TRACE._repr_html_()).rows
    assert head == ["", "0", "1", "2", "3"]
    assert [row[0] for row in rows] == ["The", " Space*", " Need*", "le*", " is", " in"]
    assert [[float(x) for x in row[1:]] for row in rows] == pytest.approx(SCORES, abs=5e-3)
    assert TRACE._repr_png_().startswith(b"\x89PNG")
    effects = ke.Effects.from_traces([TRACE])
    assert Cells(effects._repr_html_()).rows[3][1] == f"{effects.kinds['state'].aie['Last subject token'].mean[0]:.2f}"
    assert effects._repr_png_().startswith(b"\x89PNG") and ke.Effects()._repr_html_()
    edit = ke.Edit({}, "rome", [{"prompt": "{} is", "subject": "<b>", "target_new": " x"}], model={"name": "m"})
    assert Cells(edit._repr_html_()).rows[1] == ["<b> is", "", " x"]
    assert Cells(SAID._repr_html_()).rows[1] == ["It is", " a", " b; p(b) 0.750"]
    assert ke.Report([])._repr_html_() and ke.Report([])._repr_png_() is None


def test_nothing_is_written_to_a_place_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    findings = Findings([{"method": "m", "S": 1.0}], {}, ("method",), {"f": lambda _: figure_of(1, 1)})
    suggestion = object.__new__(Suggestion)
    effects, report, sequential = ke.Effects.from_traces([TRACE]), ke.Report([]), Sequential([], [], {})
    edit = ke.Edit({}, "rome", [], model={"name": "m"})
    for write in (
        TRACE.save, TRACE.plot, effects.save, effects.plot, effects.to_html, report.save, report.plot,
        report.to_html, findings.save, findings.plot, findings.to_html, SAID.plot, SAID.to_html, sequential.save,
        sequential.plot, sequential.to_html, suggestion.save, edit.save, edit.to_peft,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="''|'.'"):
            write("")
    assert not list(tmp_path.iterdir())


def test_colours_of_cells() -> None:
    [row] = shades(np.array([[-0.5, 0.0, 0.5, np.nan]]), "PuOr")
    white, orange, purple = row[1], row[0], row[2]
    assert all(int(x) > 240 for x in re.findall(r"\d+(?=[,)])", white)) and white.endswith("#000")
    assert orange != purple and purple.endswith("#fff") and row[3] == white
    assert Cells(html_table("c", ["a", "b"], [["x", float("nan")], ["<", None]])).rows[1:] == [["x", ""], ["<", ""]]
