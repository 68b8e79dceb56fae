"""An error quotes a long text in short, whichever door it came through, and on one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.checks import quoted
from knowedit_ext.datasets import load_counterfact, load_known, load_zsre
from knowedit_ext.editing.methods import METHODS

from .editing.models import editable

LONG = "many\nwords " * 2000
MOST = 1500


@pytest.mark.parametrize("text, shown", [("short", "'short'"), ("", "''"), ("two\nlines\n", "'two lines'"), (3, "'3'")])
def test_a_short_text_is_shown_whole(text: object, shown: str) -> None:
    assert quoted(text) == shown


@pytest.mark.parametrize("length", [240, 241, 10**6])
def test_a_long_text_is_shown_by_its_ends(length: int) -> None:
    text = "a" + "x" * (length - 2) + "z"
    assert len(quoted(text)) <= 242 and quoted(text)[1] == "a" and quoted(text)[-2] == "z"
    assert ("..." in quoted(text)) == (length > 240)


DOORS: dict[str, Callable[[ke.EditableModel], object]] = {
    "fact without slot": lambda model: ke.Fact(LONG, "w3"),
    "fact with slots": lambda model: ke.Fact("{}" + LONG + "{}", "w3"),
    "subject not there": lambda model: ke.EditRequest.of(dict(prompt="w5", subject=LONG, target_new="w1")),
    "ambiguous": lambda model: ke.EditRequest.of(dict(prompt="w3 " + LONG + " w3", subject="w3", target_new="w1")),
    "empty target": lambda model: ke.EditRequest("{} " + LONG, LONG, " "),
    "more than the positions": lambda model: ke.trace(model, ke.Fact("{} " + LONG, "w3")),
    "noise": lambda model: ke.noise_level(model, LONG),
    "contradictory": lambda model: ke.edit(
        model, [ke.EditRequest("{} " + LONG, "w3", t) for t in ("w1", "w2")], "ft", params=ke.FTParams(layers=(1,))
    ),
    "method": lambda model: ke.edit(model, [], LONG, params={}),
    "preset": lambda model: ke.MEMITParams.preset(LONG),
    "layer names": lambda model: METHODS["ultraedit"].params_of({"inner_params": [LONG]}),
    "weight": lambda model: ke.Edit({LONG: torch.ones(2, 2)}).apply(model),
    "not finite": lambda model: ke.Edit({LONG: torch.full((2, 2), torch.nan)}),
    "checksums": lambda model: ke.Edit({}, base={LONG: ["x"]}),
    "delta": lambda model: ke.Edit({}).delta(LONG),
    "model": lambda model: ke.load_model("/" + LONG),
    "record": lambda model: load_counterfact(
        [dict(case_id=1, prompt=LONG, subject="w3", target_new="w1", ground_truth="w2")]
    ),
    "known": lambda model: load_known([dict(known_id=1, prompt=LONG, subject="w3", attribute="w1")]),
    "zsre": lambda model: load_zsre(
        [dict(subject="w3", src=LONG, rephrase="w3", answers=["w1"], alt="w2", loc="w5", loc_ans="w4")]
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_errors_stay_short(door: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)) as error:
        DOORS[door](editable("gpt2"))
    assert len(str(error.value)) <= MOST, len(str(error.value))
