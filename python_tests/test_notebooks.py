"""The notebooks in examples/: their cells run on the world and say what is stored; nothing of a machine is in them."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"(?<!\w)-?\d+\.\d+")


def cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def run(code: str, names: dict[str, Any]) -> tuple[str, Any]:
    """What a cell prints, and the value of its last line, where that is one."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    return printed.getvalue(), value


def alike(said: str, stored: str) -> bool:
    """Most words and numbers, to one digit behind the point: processors differ in what lies close together."""
    words = [re.sub(r"<[^>]+>", " ", text) for text in (said, stored)]
    rounded = [NUMBER.sub(lambda number: f"{float(number[0]):.1f}", text).split() for text in words]
    return SequenceMatcher(None, *rounded, autojunk=False).ratio() >= 0.8


def test_what_is_said_is_compared() -> None:
    stored = "layer 0: ES 100.0  PS 97.5\nlayer 1: ES  90.0  PS  80.0"
    assert alike(stored.replace("97.5", "97.52"), stored) and not alike("layer 0: ES 0.0 PS 0.0", stored)


def test_there_are_four() -> None:
    assert [path.stem for path in BOOKS] == ["1_locate", "2_edit", "3_measure", "4_which_layers"]


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_says_what_is_stored(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in cells(path):
        printed, value = run("".join(cell["source"]), names)
        streams = [output for output in cell["outputs"] if output["output_type"] == "stream"]
        assert alike(printed, "".join(text for output in streams for text in output["text"])), cell["id"]
        shown = [output["data"] for output in cell["outputs"] if output["output_type"] == "execute_result"]
        assert (value is not None) == bool(shown), cell["id"]
        if value is not None and value.__class__.__name__ != "Picture":
            html = value._repr_html_()
            assert alike(html, "".join(shown[0]["text/html"])), cell["id"]


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_executed_small_and_of_no_machine(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text) < 400_000
    numbers = [cell["execution_count"] for cell in cells(path)]
    assert numbers == list(range(1, len(numbers) + 1))
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    assert outputs and {output["output_type"] for output in outputs} <= {"execute_result", "stream"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for place in (str(Path.home()), os.sep + "tmp" + os.sep, str(FOLDER.parent.parent), "site-packages"):
        assert place not in text, place
