"""Pages: what stands on them are the data, nothing of them asks the network, and odd texts stay texts."""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("plotly", reason="the extra html is not installed")
pytest.importorskip("jinja2", reason="the extra html is not installed")

import knowedit_ext as ke  # noqa: E402
from knowedit_ext.cli import study as study_commands  # noqa: E402
from knowedit_ext.commands.study_inputs import tell  # noqa: E402
from knowedit_ext.datasets.relations import relation_name  # noqa: E402
from knowedit_ext.pages.page import Measured, Page, Table, rendered, write_page  # noqa: E402
from knowedit_ext.pages.results import report_page, trace_page  # noqa: E402
from knowedit_ext.pages.study import study_page  # noqa: E402
from knowedit_ext.studies.findings import Findings  # noqa: E402
from knowedit_ext.studies.localization_results import Localization  # noqa: E402
from knowedit_ext.studies.results import Sequential  # noqa: E402
from knowedit_ext.studies.suggestion_page import suggestion_page  # noqa: E402

from .support.pages import (  # noqa: E402
    EDIT,
    FACT,
    MODEL,
    PAGES,
    RECORDS,
    RELATIONS,
    REPORT,
    SAID,
    STUDY,
    SUGGESTION,
    TRACES,
)


class Read(HTMLParser):
    """Tables by caption: rows of texts; addresses; what stands in scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables, self.addresses, self.scripts, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.open.append(tag) if tag not in ("meta", "input") else None
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


def near(value: float):
    return pytest.approx(value, rel=0.06) if abs(value) < 1e-3 else pytest.approx(value, rel=6e-4, abs=6e-4)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_for_nothing_and_has_its_numbers(name: str, tmp_path: Path) -> None:
    page = PAGES[name]
    write_page(tmp_path / "page.html", page)
    text = (tmp_path / "page.html").read_text()
    read = Read(text)
    assert all(re.fullmatch(r"#record\d+", address) for address in read.addresses)  # to places in the page itself
    assert "default-src 'none'" in text and "@import" not in text
    tables = [table for owner in (*page.charts, page, *page.records) for table in owner.tables]
    assert tables and len(tables) == len(read.tables)
    for table, (head, *rows) in zip(tables, read.tables, strict=True):
        assert head == list(table.columns) and len(rows) == len(table.rows)
        for wanted, row in zip(table.rows, rows, strict=True):
            for value, said in zip(wanted, row, strict=True):
                if isinstance(value, float):
                    assert float(said) == near(value)
                elif isinstance(value, Measured):
                    assert [float(x) for x in said.split(" ± ")] == [near(value.value), near(value.half)]
                else:
                    assert said == ("" if value is None else str(value))
    charts = json.loads(read.scripts[0])
    for chart, wanted in zip(charts, page.charts, strict=True):
        for drawn, trace in zip(chart["data"], wanted.traces, strict=True):
            assert all(drawn[key] == trace[key] for key in ("type", "x", "y", "customdata"))


def test_the_map_and_its_samples() -> None:
    trace = TRACES["state"]
    chart, _ = PAGES["traces"].charts
    assert chart.traces[0]["z"] == trace.scores.tolist()
    said = chart.traces[0]["customdata"][1][2]
    assert [float(x) for x in said.partition("noise samples ")[2].split(",")] == pytest.approx(
        trace.sample_scores[:, 1, 2].tolist(), abs=6e-4
    )
    half = 1.96 * trace.sample_scores[:, 1, 2].std(ddof=1) / 3**0.5
    assert f"{trace.scores[1, 2]:.4f} ± {half:.4f} (95 %)" in said


def test_maps_of_a_page_have_one_scale_white_where_nothing_is_restored() -> None:
    maps = [chart.traces[0] for chart in PAGES["traces"].charts]
    shown = np.concatenate([np.append(trace.scores, trace.low_score) for trace in TRACES.values()])
    assert {(m["zmin"], m["zmax"]) for m in maps} == {(shown.min(), shown.max())}
    for trace, each in zip(TRACES.values(), maps, strict=True):
        place = (trace.low_score - each["zmin"]) / (each["zmax"] - each["zmin"])
        nearest = min(each["colorscale"], key=lambda stop: abs(stop[0] - place))[1]
        assert all(int(x) > 225 for x in re.findall(r"\d+", nearest)), nearest


def test_traces_of_different_prompts_are_no_page() -> None:
    other = replace(TRACES["mlp"], tokens=["x", *TRACES["mlp"].tokens[1:]])
    with pytest.raises(ValueError, match="of one prompt"):
        trace_page([TRACES["state"], other])


def test_the_probabilities_of_a_record() -> None:
    [table] = PAGES["report"].records[0].tables
    case, record = REPORT.cases[0], RECORDS[0]
    sides = [case[when]["rewrite_prompts_probs"][0] for when in ("pre", "post")]
    chances = [math.exp(-nll[target]) for nll in sides for target in ("target_new", "target_true")]
    head = list(table.columns)
    shown_of = dict(zip(head, table.rows[0], strict=True))
    assert [shown_of[f"p({a}) {s}"] for s in ("before", "after") for a in ("new", "true")] == chances
    assert table.rows[0][:2] == [FACT.text, "rewrite"]
    own = [row[head.index("p(own answer) after")] for row in table.rows if row[1] == "same_subject"]
    measured = case["post"]["same_subject_prompts_probs"]
    assert own == [math.exp(-each["target"]) for each in measured] and len(own) > 1
    shown = {row[1]: [each[0] for each in table.rows if each[1] == row[1]] for row in table.rows}
    assert shown["paraphrase"] == record["paraphrase_prompts"]
    assert shown["neighborhood"] == record["neighborhood_prompts"]
    assert REPORT.records and all(row[0] in str(record) or row[1] == "rewrite" for row in table.rows)
    [without] = report_page(REPORT).records[0].tables
    assert without.rows[1][0] == "paraphrase 0" and [r[1:] for r in without.rows] == [r[1:] for r in table.rows]


def test_before_and_after_are_what_the_model_says() -> None:
    ids = MODEL.tokenizer(SAID.prompts[0], return_tensors="pt")
    for side, applied in ((SAID.before, nullcontext()), (SAID.after, EDIT.applied(MODEL))):
        with applied, torch.no_grad():
            chances = MODEL.hf(**ids).logits[0, -1].softmax(-1)
        top = chances.topk(10)
        assert [p for _, p in side[0].likeliest] == pytest.approx(top.values.tolist(), rel=1e-3, abs=1e-6)
        assert side[0].likeliest[0][0] == MODEL.tokenizer.decode([int(top.indices[0])])
        new, true = side[0].targets.items()
        for target, p in (new, true):
            first, *rest = MODEL.tokenizer.encode(target)
            assert rest or p == pytest.approx(float(chances[first]), rel=1e-3, abs=1e-6)
    rows = SAID.rows()
    assert len(rows) == 2 * len(SAID.prompts) * 12 and {row["side"] for row in rows} == {"before", "after"}
    chart = PAGES["before and after"].charts[0]
    shown = dict(zip(chart.traces[1]["x"], chart.traces[1]["y"], strict=True))
    assert all(shown[token] == p for token, p in SAID.after[0].likeliest)


def test_before_without_an_edit_needs_prompts() -> None:
    assert ke.before_after(MODEL, prompts=[FACT.text], tokens=1).after is None
    with pytest.raises(ValueError, match="no prompts"):
        ke.before_after(MODEL)


def test_rows_of_studies_become_lines_levels_and_groups(tmp_path: Path) -> None:
    [layers] = PAGES["study over layers"].charts
    assert [(t["name"], t["x"], t["y"]) for t in layers.traces] == [
        ("unedited", [0, 1], [1.5, 1.5]),
        ("rome", [0, 1], [0.0, 10.0]),
        ("memit", [0, 1], [0.0, 10.0]),
    ]
    assert layers.traces[1]["error_y"]["array"] == [0.5, 0.5]
    [relations] = PAGES["study of relations"].charts
    assert [(t["name"], t["x"], t["y"]) for t in relations.traces] == [
        ("rome", ["place of birth (P19)", "native language (P103)"], [0.0, 1.0]),
        ("memit", ["place of birth (P19)", "mine"], [2.0, 3.0]),
    ]
    by_method = study_page("Relations", RELATIONS, ("method", "relation"), {}, split="method").charts
    assert [(chart.title, [t["y"] for t in chart.traces]) for chart in by_method] == [
        ("S, rome", [[0.0, 1.0]]),
        ("S, memit", [[2.0, 3.0]]),
    ]
    assert relation_name("P19+P103") == "place of birth (P19) + native language (P103)"
    assert relation_name("memit+history") == "memit+history"
    Findings(STUDY, {"seed": 1}, ("method",)).to_html(tmp_path / "study.html")
    assert Read((tmp_path / "study.html").read_text()).tables[0][2][:2] == ["rome", "0"]
    Findings([], {}, ("method",)).to_html(tmp_path / "nothing.html")  # of a study that is still computed


def test_what_was_suggested_stands_beside_what_is_known() -> None:
    page = PAGES["suggestion"]
    unseen, presets, by_size, by_rate = page.charts
    assert [(t["name"], t["y"], t["error_y"]["array"]) for t in unseen.traces] == [
        ("suggested", [77.0, 76.0, 75.0, 74.0], [1.5] * 4),
        ("begun from", [61.0, 60.0, 59.0, 58.0], [1.5] * 4),
    ]
    assert [(t["name"], t["y"][0]) for t in presets.traces] == [
        ("suggested", 80.0),
        ("preset world", 75.0),
        ("begun from", 60.0),
    ]
    lines = {t["name"]: dict(zip(t["x"], t["y"], strict=True)) for t in by_rate.traces}
    assert lines["0.1"] == {0: 51.0, 1: 56.0, 2: 61.0, 3: 66.0, 4: 80.0}
    assert lines["0.2"] == {0: 52.0, 1: 57.0, 2: 62.0, 3: 75.0}  # the preset's, above the 67 of one layer
    assert lines["0.5"] == {3: 60.0}  # the one at layer 5 could not be edited
    assert lines["tracing effect of MLPs, 3 facts"] == dict(enumerate(SUGGESTION.effect["effect"]))
    assert [t["name"] for t in by_size.traces] == ["1", "3", "tracing effect of MLPs, 3 facts"]
    assert all(t.get("yaxis") == ("y2" if t["type"] == "bar" else None) for t in by_size.traces)
    [table] = page.tables
    assert [row[table.columns.index("what")] for row in table.rows].count("preset world") == 2  # in both rounds
    assert len(table.rows) == len(SUGGESTION.rows) and "+16 ± 2.5 (95 %, paired)" in page.lead
    assert json.loads(page.records[0].text) == SUGGESTION.params.to_dict()
    alone = suggestion_page(replace(SUGGESTION, effect=None, held=SUGGESTION.held[:1], difference=None))
    assert [len(chart.traces) for chart in alone.charts] == [1, 3, 2, 3]


def test_texts_are_no_markup() -> None:
    odd = "</script><script>alert(1)</script><b>&'\""
    trace = replace(TRACES["state"], tokens=[odd, *TRACES["state"].tokens[1:]])
    read = Read(rendered(trace_page([trace])))
    assert len(read.scripts) == 3 and read.tables[0][1][0] == f"0 {odd}*"
    assert json.loads(read.scripts[0])[0]["data"][0]["y"][0] == f"0 {odd}*"
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
    with pytest.raises(ValueError, match="a page is written as .html"):
        SUGGESTION.to_html(tmp_path / "x.pdf")
    assert not list(tmp_path.iterdir())


def test_every_study_writes_its_page(tmp_path: Path) -> None:
    """By the option that all of their commands have (pairs are a page already)."""
    commands = {command.callback.__name__: command.callback for command in study_commands.registered_commands}
    takes = {name for name, command in commands.items() if "html" in inspect.signature(command).parameters}
    assert takes == set(commands) - {"pairs"} and len(takes) > 8
    tell(Findings(STUDY, {}, ("method",)), tmp_path, tmp_path / "study.html")
    assert Read((tmp_path / "study.html").read_text()).tables


def test_sequential_edits_and_localization_are_pages(tmp_path: Path) -> None:
    rows = [{"method": "rome", "seed": s, "edits": e, "rewrite": 10.0 * s + e, "tasks": {"t acc": 0.5}}
            for s in (0, 1) for e in (0, 10)]  # fmt: skip
    Sequential(rows, [], {}).to_html(tmp_path / "sequential.html")
    tables = Read((tmp_path / "sequential.html").read_text()).tables
    assert [dict(zip(tables[0][0], row, strict=True))["rewrite"] for row in tables[0][1:]] == [
        "5.000 ± 63.53",
        "15.00 ± 63.53",
    ]
    scores = dict.fromkeys(("rewrite", "paraphrase", "neighborhood", "overall"), 0.5)
    rows = [
        {"problem": "p", "method": m, "layer": n, "null": False, **scores}
        for m in ("rome", "ft")
        for n in (0, 1)
        for _ in "ab"
    ]
    Localization(rows, np.zeros((2, 2)), {}, [], []).to_html(tmp_path / "localization.html")
    head, *rows = Read((tmp_path / "localization.html").read_text()).tables[-1]
    assert len(rows) == 4 and dict(zip(head, rows[0], strict=True))["rewrite"] == "0.500 ± 0.000"
