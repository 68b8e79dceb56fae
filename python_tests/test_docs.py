"""What README.md and docs/ show is there: Python runs, on the built-in world; commands are read by the parser."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import knowedit_ext as ke
from knowedit_ext.cli import app, main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]
AS_THEY_STAND = (ROOT / "docs" / "index.md", *(ROOT / "docs" / "howto").glob("*.md"))
HOW_TO = ("edit", "measure", "share")  # those with commands on the world
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(((?!https?:)[^)#\s]+)(?:#[^)]*)?\)")
# A model of one's own, as the world: its name, where it runs, its layers, what only the large ones have.
ON_THE_WORLD = (
    ('"gpt2-xl"', '"world"'), ('"gpt-j"', '"world"'), ('"gpt2-xl/ft-l"', '"world/ft-l"'), ('device="cuda", ', ""),
    ("[17]", "[3]"), ("(17,", "(3,"), ("range(13, 18)", "range(1, 4)"), ("15000.0", "10.0"),
    ("model, 17)", "model, 3)"), ("[0, 4, 8]", "[0, 1]"), ('"gpt-j/ft-w"', '"world/ft-l"'),
    ("rank=1920", "rank=4"), ("TrainingParams()", "TrainingParams(iterations=1, val_edits=1)"),
    ("gpt2-xl_MEMIT", "world_MEMIT"), ("stats/gpt2-xl/", "stats/world/"),
    ('methods=["rome", "memit", "ft-1", "ft-5"]', 'methods=["ft-1"]'),  # minutes
)  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every `knowedit` on a page, `torchrun ... -m knowedit_ext` among them."""
    for code in (*blocks(page, ""), *blocks(page, "sh")):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "..." in words:
                continue
            if words[:1] == ["knowedit"]:
                yield words[1:]
            elif "knowedit_ext" in words and words[0] in ("torchrun", "python"):
                yield words[words.index("knowedit_ext") + 1 :]


def parse(arguments: list[str]) -> None:
    """By the command's own parser; files need not be there."""
    command, context = typer.main.get_command(app), None
    while hasattr(command, "commands"):
        context = command.make_context("knowedit", [], parent=context, resilient_parsing=True)
        command, arguments = command.commands[arguments[0]], arguments[1:]
    for parameter in command.params:
        parameter.callback = None
        info = copy(parameter.type_descriptor.parameter_info)
        info.exists = False
        parameter.type_descriptor = replace(parameter.type_descriptor, parameter_info=info)
    command.make_context("knowedit", arguments, parent=context)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that pages name, small, and of the world."""
    monkeypatch.chdir(tmp_path)
    texts = [f"{fact['prompt']} {fact['attribute']}." for fact in ke.world_facts()[:200]]
    (tmp_path / "wikipedia.txt").write_text("\n".join(texts))
    (tmp_path / "known_1000.json").write_text(json.dumps(ke.world_facts()[:3]))
    (tmp_path / "counterfact.json").write_text(json.dumps(ke.world_records()[:3]))
    ke.EFK.new(ke.load_model("world")).save("efk.safetensors")
    return tmp_path


@cache
def made() -> tuple[ke.Moments, list[ke.Edit], ke.Trace]:
    """Moments, two edits and a trace of the world: results, which pages read."""
    model, records = ke.load_model("world"), ke.world_records()[:2]
    moments = ke.collect_moments(model, "world", layers=range(6), max_tokens=5000)
    edits = [ke.rome(model, record, ke.ROMEParams.preset("world"), moments) for record in records]
    first = ke.EditRequest.of(records[0])
    return moments, edits, ke.trace(model, ke.Fact(first.prompt, first.subject, first.target_true), "mlp")


def given() -> dict[str, Any]:
    """What a page speaks of without making it."""
    model, records = ke.load_model("world"), ke.world_records()[:3]
    request = ke.EditRequest.of(records[0])
    fact = ke.Fact(request.prompt, request.subject, request.target_true)
    moments, edits, trace = made()
    pre, post = ({"rewrite": each, "paraphrase": each, "neighborhood": each} for each in (0.9, 0.1))
    return {
        "ke": ke, "model": model, "records": records, "record": records[0], "counterfact_records": records,
        "request": request, "requests": records[:2], "many": records[:2], "moments": moments, "m": moments,
        "fact": fact, "edit": edits[0], "edits": list(edits), "trace": trace, "K": torch.randn(640, 4),
        "pre": pre, "post": post, "texts": ["a text"] * 8, "score": [0.1, 0.5, 0.3, 0.9], "layer": [0, 1, 0, 1],
        "effect": [0.2, 0.4, 0.1, 0.3],
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_runs(page: Path, place: Path) -> None:
    """The blocks of a page one after the other, as a reader would."""
    code = blocks(page, "python")
    if not code:
        return
    if page.name == "dropin.md" and importlib.util.find_spec("easyeditor") is None:
        pytest.skip("the page is about EasyEdit, which is not installed")
    if page.name == "suggest.md":
        pytest.skip("the page's search takes minutes; studies/test_suggest.py runs one")
    names = {} if page in AS_THEY_STAND or page.name == "README.md" else given()
    for block in code:
        if page in AS_THEY_STAND or (page.name == "README.md" and block is code[0]):
            exec(block, names)  # as it stands
            continue
        for own, here in ON_THE_WORLD:
            block = block.replace(own, here)
        exec(block, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_read(page: Path) -> None:
    for arguments in commands(page):
        try:
            parse(arguments)
        except Exception as error:
            raise AssertionError(f"{page.name}: knowedit {shlex.join(arguments)}: {error!r}") from error


def test_a_command_that_is_not_there_is_found() -> None:
    for wrong in (["tracee", "world"], ["trace", "world", "--promt", "x"], ["study", "scaling", "world", "--counts"]):
        with pytest.raises(Exception):  # noqa: B017
            parse(wrong)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", *(f"docs/howto/{name}.md" for name in HOW_TO)])
def test_the_commands_on_the_world_run(page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """One after the other; pages that begin with a saved edit get one."""
    if page.startswith("docs/howto"):
        given()["edit"].save("edit.safetensors")
    ran = 0
    for arguments in commands(ROOT / page):
        if "world" in arguments or arguments[0] in ("report", "compare", "methods", "doctor") or "--show" in arguments:
            monkeypatch.setattr("sys.argv", ["knowedit", *arguments])
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code, (arguments, capsys.readouterr().err)
            ran += 1
    assert ran >= 2
    if page == "README.md":
        assert {"trace.png", "edit.safetensors", "traces", "runs"} <= {path.name for path in place.iterdir()}


def test_the_reference_has_every_public_name() -> None:
    told = {
        line.split(".")[-1] for page in PAGES for line in page.read_text("utf-8").splitlines() if line[:4] == "::: "
    }
    told |= {"METHODS", "PROBLEMS"}  # tables, told in words
    assert set(ke.__all__) <= told


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To files of the repository; anchors are held by `make docs`. Its pages of commands are made there."""
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists() or target.endswith("reference/commands.md"), target
