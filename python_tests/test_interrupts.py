"""Ctrl-C at every call that Python makes on the way: what was to be put back is put back, what was written is whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.changes import LowRank
from knowedit_ext.model.hooks import Hooks, resting
from knowedit_ext.runs.files import atomic_write, write_tensors
from knowedit_ext.runs.interrupts import imported, whole_contexts
from knowedit_ext.sweep.attention import tree_attention_in

from .editing.models import fresh
from .editing.plain import weight_name
from .support.interrupted import interrupt
from .support.unchanged import assert_unchanged, snapshot

MODEL = fresh("gpt2")
WEIGHT = weight_name(MODEL, 1)
EDIT = ke.Edit({WEIGHT: LowRank(torch.ones(128, 1), torch.ones(32, 1) / 8, True)})


def hooked() -> None:
    with whole_contexts(), Hooks() as hooks:
        for layer in MODEL.modules.layers:
            hooks.behind(layer, lambda x: None)


def at_rest() -> None:
    with resting(MODEL):
        pass


def applied() -> None:
    with EDIT.applied(MODEL):
        pass


def tree() -> None:
    with whole_contexts(), tree_attention_in(MODEL.modules):
        pass


def traced() -> None:
    ke.trace(MODEL, ke.Fact("w5 {} w9", "w3"), samples=1, noise=0.5, window=2)


def every_call(door: Callable[[], None], step: int = 1):
    at = 0
    while interrupt(door, at):
        yield at
        at += step


@pytest.mark.parametrize("door", [hooked, at_rest, applied, tree, traced])
def test_a_model_is_as_it_was(door: Callable[[], None]) -> None:
    MODEL.hf.train()
    before = snapshot(MODEL.hf)
    for _ in every_call(door, 97 if door is traced else 1):
        assert_unchanged(before, MODEL.hf)
        assert not MODEL.applied_edits


@pytest.mark.parametrize("write", ["bytes", "tensors"])
def test_a_file_is_the_old_or_the_new_one_and_nothing_is_left_beside_it(write: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    contents = set()

    def door() -> None:
        if write == "tensors":
            write_tensors(path, {"x": torch.ones(2)}, {})
        else:
            atomic_write(path, lambda file: file.write(b"new"))

    door()
    new = path.read_bytes()
    for at in every_call(door):
        assert [p.name for p in tmp_path.iterdir()] == ["a"], at
        contents.add(path.read_bytes())
        path.write_bytes(b"old")
    assert contents == {b"old", new}


PACKAGE = {
    "__init__": "import {0}.a\nimport {0}.b\nnumber = {0}.b.number",
    "a": "one = 1",
    "b": "import {0}.a\nnumber = {0}.a.one",  # a new package does not have what was imported for the old one
}


def halves(package: str) -> object:
    return __import__(package)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("door", [imported, halves])
def test_a_broken_off_import_does_not_spoil_the_next(
    door: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module stays behind the package it was imported for; a plain import is the plant."""
    monkeypatch.syspath_prepend(tmp_path)
    spoiled, at, more = 0, 0, True
    while more:
        name = f"broken_off_{door.__name__}_{at}"
        (tmp_path / name).mkdir()
        for module, code in PACKAGE.items():
            (tmp_path / name / f"{module}.py").write_text(code.format(name))
        more, at = interrupt(lambda name=name: door(name), at), at + 3
        try:
            spoiled += imported(name).number != 1
        except (AttributeError, ImportError):
            spoiled += 1
    assert at > 10 and bool(spoiled) == (door is halves)
