"""A small slice of the campaign, and whether it would find what it looks for."""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from campaign import fuzz, kills, subjects
from campaign.outcome import Case, Finding, fault_of
from campaign.targets import DOORS

import knowedit_ext as ke

A_FEW = 3


def _said(found: Finding) -> str:
    return f"{found.target}:{found.seed} {found.kind}: {found.said} {found.where} {found.shown}"


def test_a_few_inputs_of_every_door() -> None:
    outcomes = list(fuzz.fuzz(fuzz.inputs_of(list(DOORS), A_FEW * len(DOORS)), processes=1))
    assert len(outcomes) == A_FEW * len(DOORS)
    assert not [_said(found) for _, _, found in outcomes if isinstance(found, Finding)]


@pytest.mark.parametrize("command", ["moments", "edit, ft"])
def test_one_run_ended_in_every_way(command: str) -> None:
    told = list(kills.kill([(command, seed) for seed in range(len(kills.WAYS))], processes=2))
    assert not [_said(found) for trial in told for found in trial.findings]
    assert sum(trial.kills for trial in told) > 3 and sum(trial.identical for trial in told) == len(kills.WAYS)


# -- would it find it? -------------------------------------------------------------------------------------------------


def _change_weight() -> None:
    with torch.no_grad():
        next(subjects.model().hf.parameters()).add_(1e-3)


def _hook() -> None:
    subjects.model().hf.register_forward_hook(lambda *_: None)


def _write_and_refuse(folder: Path) -> None:
    (folder / "half").write_text("a file")
    ke.Fact("no slot", "Ann")


def _endless() -> None:
    while True:
        try:
            time.sleep(1)
        except Exception:  # as code that takes every error for a bad input does
            pass


PLANTED = {
    "changed model": lambda folder: _change_weight(),
    "changed model ": lambda folder: _hook(),
    "refused, but wrote": _write_and_refuse,
    "ended the process": lambda folder: os._exit(3),
    "KeyError is no error for people": lambda folder: {}["key"],
    "MemoryError is no error for people": lambda folder: np.ones(1 << 40),
    "ValueError that nobody wrote": lambda folder: int("x"),
    "TypeError that nobody wrote": lambda folder: len(3),
    "time": lambda folder: _endless(),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_fault_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DOORS, "planted", lambda random, folder: Case(lambda: PLANTED[kind](folder)))
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    outcomes = list(fuzz.fuzz([("planted", 0), ("prompts", 0)], processes=1))
    assert [door for door, _, _ in outcomes] == ["planted", "prompts"]  # it goes on behind a fault
    found = outcomes[0][2]
    assert isinstance(found, Finding) and found.kind == kind.strip()


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(result: float) -> None:
        assert np.isfinite(result), "not finite"

    monkeypatch.setitem(DOORS, "planted", lambda random, folder: Case(lambda: float("nan"), check))
    (_, _, found), *_ = fuzz.fuzz([("planted", 0)], processes=1)
    assert isinstance(found, Finding) and found.kind == "wrong result" and "not finite" in found.said


def test_a_message_must_name_what_was_wrong(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError) as error:
        ke.Edit.load(path)
    assert fault_of(error.value, ("edit.safetensors",)) is None
    assert "names none of" in fault_of(error.value, ("another.safetensors",))


def _careless() -> int:
    """Appends to its result, so that a run that goes on has the beginning twice."""
    with open("out/result", "a") as file:
        for number in range(3):
            file.write(f"{number}\n" * 1000)
            file.flush()
            with open("out/progress", "w") as progress:
                progress.write(str(number))
    return 0


def _talkative() -> int:
    raise KeyError("a traceback")


@pytest.mark.parametrize("seed", [kills.WAYS.index("kill at a write"), kills.WAYS.index("kill in a write")])
def test_a_run_that_does_not_go_on_is_found(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kills.COMMANDS, "planted", _careless)
    told = kills.trial("planted", seed, tmp_path, kills.undisturbed("planted", tmp_path))
    assert told.kills and [found.kind for found in told.findings] == ["another result"]


def test_a_traceback_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kills.COMMANDS, "planted", _talkative)
    sound = kills.Undisturbed({}, 1.0, 1, 2)
    told = kills.trial("planted", kills.WAYS.index("full"), tmp_path, sound)
    assert {"a traceback", "does not go on"} <= {found.kind for found in told.findings}


def test_seeds_give_their_inputs_again(tmp_path: Path) -> None:
    for door in ("prompts", "records", "command_lines"):
        folders = [tmp_path / f"{door}{n}" for n in range(2)]
        shown = []
        for folder in folders:
            folder.mkdir()
            shown.append(DOORS[door](Random(f"{door}:1"), folder).shown)
        assert shown[0] == shown[1]
