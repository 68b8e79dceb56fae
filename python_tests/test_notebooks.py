"""The notebooks in examples/: their cells run on the world and say what is stored; nothing of a machine is in them."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+\.\d+|-?\d+")


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
    """The same words; numbers within what processors differ in."""
    if NUMBER.sub("#", said) != NUMBER.sub("#", stored):
        return False
    pairs = zip(map(float, NUMBER.findall(said)), map(float, NUMBER.findall(stored)), strict=True)
    return all(abs(a - b) <= 0.05 + 0.02 * abs(b) for a, b in pairs)


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
