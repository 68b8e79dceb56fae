"""Ctrl-C at any call that Python makes: the model is as it was, and so is what had been written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from support.interrupted import interrupt

import knowedit_ext as ke
from knowedit_ext.editing.methods import METHODS

from .. import subjects
from ..outcome import Case


def interrupts(random: Random, folder: Path) -> Case:
    model, edit, other = subjects.model(), subjects.edit("rome"), subjects.edit("ft")
    methods = {name: (partial(_edit, name), 12000) for name in METHODS}
    doors: dict[str, tuple[Callable[[], Any], int]] = {  # with about how many calls it makes
        "trace": (lambda: ke.trace(model, ke.Fact(**subjects.FACT), samples=1, window=2), 4000),
        "apply": (lambda: _put_on(edit), 300),
        "evaluate": (lambda: ke.evaluate(model, subjects.RECORDS, edit, generation=False), 8000),
        "evaluate each": (lambda: ke.evaluate(model, subjects.RECORDS, [edit] * 2, generation=False), 8000),
        "generate": (lambda: ke.evaluate(model, subjects.RECORDS, edit, max_length=12), 12000),
        "moments": (lambda: ke.collect_moments(model, subjects.TEXTS, [1], progress=False), 8000),
        "save": (lambda: edit.save(folder / "edit.safetensors"), 300),
    }
    doors |= methods
    name = random.choice(sorted(doors))
    door, calls = doors[name]
    at = random.randrange(calls)
    if name == "save":
        other.save(folder / "edit.safetensors")

    def check(_: Any) -> None:
        left = [path.name for path in folder.iterdir() if path.name != "edit.safetensors"]
        assert not left, f"{', '.join(left)} is left over"
        if name == "save":
            there = ke.Edit.load(folder / "edit.safetensors")
            assert any(subjects.same_edit(there, one) for one in (edit, other)), "half a file"

    return Case(lambda: interrupt(door, at), check, shown=f"{name} at call {at}")


def _edit(method: str) -> ke.Edit:
    options = {name: value for name, value in subjects.options(method).items() if name != "contexts"}
    return ke.edit(subjects.model(), [subjects.REQUEST], method, params=subjects.params(method), **options)


def _put_on(edit: ke.Edit) -> None:
    with edit.applied(subjects.model()):
        pass


DOORS = (interrupts,)
