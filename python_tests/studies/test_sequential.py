"""Sequential edits: shares against a plain loop, gone on with after any kill, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.runs.lock import alone
from knowedit_ext.studies import Treatment, sequential
from knowedit_ext.studies.spread import Spread
from knowedit_ext.world import load_world

from ..support.processes import finish, fork, hashes

ULTRA = "ultraedit+history"
TWO = (ULTRA, "ultraedit:lr=1e-4")
ASKED = dict(params="world", edits=7, batch=3, first=4, untouched=5, neighbours=2)
SCRIPT = f"""
import sys
import torch
torch.set_num_threads(1)
import knowedit_ext as ke
from knowedit_ext.studies import sequential
from knowedit_ext.world import load_world
world = load_world()
model = ke.load_model(world.folder, dtype="float32")
made = sequential(model, world.records()[:20], {TWO}, sys.argv[1], seeds=[0, 1], text=world.fillers(2), **{ASKED})
there = {{(row["method"], row["seed"]) for row in made.rows}}
assert len(there) == 4, there
"""


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return ke.load_model(load_world().folder, dtype="float32")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return load_world().records()[:20]


def study(model: ke.EditableModel, records: list[dict], out: Path, methods=TWO, **more):
    return sequential(model, records, methods, out, **(ASKED | dict(text=load_world().fillers(2)) | more))


def plain_nll(model: ke.EditableModel, prompt: str, target: str) -> tuple[float, bool]:
    """Mean negative log-probability of the target's tokens, and whether all of them are the likeliest."""
    ids = model.tokenizer(prompt)["input_ids"]
    joint = model.tokenizer(f"{prompt} {target}")["input_ids"]
    with torch.no_grad():
        logp = model.hf(torch.tensor([joint])).logits[0].double().log_softmax(-1)
    picked = [(logp[n - 1, joint[n]], logp[n - 1].argmax() == joint[n]) for n in range(len(ids), len(joint))]
    return -float(sum(p for p, _ in picked)) / len(picked), all(bool(right) for _, right in picked)


def plain_shares(model: ke.EditableModel, records: list[dict]) -> dict[str, float]:
    """Means over records, in %: said, preferred, neighbourhood."""
    likeliest, preferred, kept = [], [], []
    for record in records:
        rewrite = record["requested_rewrite"]
        new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
        prompt = rewrite["prompt"].format(rewrite["subject"])
        likeliest.append(plain_nll(model, prompt, new)[1])
        preferred.append(plain_nll(model, prompt, new)[0] < plain_nll(model, prompt, true)[0])
        near = [
            plain_nll(model, text, true)[0] < plain_nll(model, text, new)[0]
            for text in record["neighborhood_prompts"][:2]
        ]
        kept.append(sum(near) / len(near))
    return {name: 100 * sum(x) / len(x) for name, x in (("EA", likeliest), ("ES", preferred), ("NS", kept))}


def test_shares_are_a_plain_loops(model, records, tmp_path) -> None:
    """The edits of the batches, applied one after the other; perplexity and growth too."""
    import random

    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    made = study(model, records, tmp_path, methods=[ULTRA], seeds=[3])
    assert all(torch.equal(p, before[name]) for name, p in model.hf.named_parameters())
    order = random.Random(3).sample(records, len(records))
    edited, untouched = order[:7], order[7:12]
    (cell,) = (tmp_path / "cells").iterdir()
    edits = [ke.Edit.load(path) for path in sorted(cell.glob("edit_*.safetensors"))]
    assert [[r["subject"] for r in edit.requests] for edit in edits] == [
        [r["requested_rewrite"]["subject"] for r in edited[n : n + 3]] for n in (0, 3, 6)
    ]
    looks = {row["edits"]: row for row in made.rows}
    assert list(looks) == [0, 3, 6, 7]
    try:
        for edit, count in zip(edits, (3, 6, 7), strict=True):
            edit.apply(model)
            want, first = plain_shares(model, edited[:count]), plain_shares(model, edited[: min(count, 4)])
            look = looks[count]
            assert look["rewrite"] == pytest.approx(want["EA"])
            assert look["rewrite preferred"] == pytest.approx(want["ES"])
            assert look["neighbourhood"] == pytest.approx(want["NS"])
            assert look["first"] == pytest.approx(first["EA"])
            rewrites = [r["requested_rewrite"] for r in untouched]
            still = [plain_nll(model, r["prompt"].format(r["subject"]), r["target_true"]["str"])[1] for r in rewrites]
            assert look["untouched"] == pytest.approx(100 * sum(still) / len(still))
            total, tokens = 0.0, 0
            for text in load_world().fillers(2):
                ids = torch.tensor([model.tokenizer(text)["input_ids"][:128]])
                with torch.no_grad():
                    total += float(model.hf(ids, labels=ids).loss) * (ids.shape[1] - 1)
                tokens += ids.shape[1] - 1
            assert look["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
            for name, growth in look["growth of"].items():
                now = model.hf.get_parameter(name)
                want_growth = float((now - before[name]).detach().norm() / before[name].norm())
                assert growth == pytest.approx(want_growth, rel=1e-3)
    finally:
        for edit in reversed(edits):
            if any(each.edit is edit for each in model.applied_edits):
                edit.revert(model)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(model, records, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    study(model, records, out)
    return out


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_killed_study_goes_on(model, records, whole, tmp_path, monkeypatch, at: int) -> None:
    """Killed at any look, it ends with the bytes of one that was not, and makes no batch twice."""
    from knowedit_ext.studies.sequential import _Sequence

    look, calls = _Sequence._look, []

    def killed(self, count: int):
        calls.append(count)
        if len(calls) == at + 1:
            raise Killed
        return look(self, count)

    monkeypatch.setattr(_Sequence, "_look", killed)
    with pytest.raises(Killed):
        study(model, records, tmp_path / "killed")
    assert not model.applied_edits
    monkeypatch.setattr(_Sequence, "_look", look)
    study(model, records, tmp_path / "killed")
    for name in ("study.json", "study.csv", "study.md", "study.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (whole / name).read_bytes()


def test_more_methods_and_seeds_join_and_others_are_refused(model, records, tmp_path) -> None:
    study(model, records, tmp_path, methods=[ULTRA])
    path = next((tmp_path / "cells").rglob("result.json"))
    stamp = path.stat().st_mtime_ns
    more = study(model, records, tmp_path, seeds=[0, 1])
    assert path.stat().st_mtime_ns == stamp
    assert {(row["method"], row["seed"]) for row in more.rows} == {(m, s) for m in TWO for s in (0, 1)}
    with pytest.raises(ValueError, match="batch: 3 there, 2 asked"):
        study(model, records, tmp_path, batch=2)
    with pytest.raises(ValueError, match="untouched: 5 there, 4 asked"):
        study(model, records, tmp_path, untouched=4)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ended": 1}))
    with pytest.raises(ValueError, match="was altered"):
        study(model, records, tmp_path)


def test_processes_share_the_cells(model, records, tmp_path) -> None:
    study(model, records, tmp_path, methods=[TWO[0]], seeds=[1])
    name = next((tmp_path / "cells").iterdir()).name.replace("seed1", "seed0")
    with alone(tmp_path / "cells" / name):
        there = study(model, records, tmp_path, methods=[TWO[0]], seeds=[0, 1])
        assert {row["seed"] for row in there.rows} == {1}
    assert {row["seed"] for row in study(model, records, tmp_path, methods=[TWO[0]], seeds=[0, 1]).rows} == {0, 1}


def test_a_sequence_that_breaks_says_so(model, records, tmp_path, monkeypatch) -> None:
    import sys

    module = sys.modules["knowedit_ext.studies.sequential"]
    perplexity, calls = module.text_perplexity, []

    def broken(*args):
        calls.append(1)
        if len(calls) == 3:
            raise OverflowError("math range error")
        return perplexity(*args)

    monkeypatch.setattr(module, "text_perplexity", broken)
    made = study(model, records, tmp_path, methods=[ULTRA])
    assert made.ended == [{"method": ULTRA, "seed": 0, "edits": 6, "why": "OverflowError: math range error"}]
    assert "seed 0: ended after 6 edits" in made.table() and not model.applied_edits


def test_a_damaged_file_is_no_result(model, records, tmp_path) -> None:
    study(model, records, tmp_path, methods=[ULTRA])
    (cell,) = (tmp_path / "cells").iterdir()
    (cell / "result.json").unlink()
    (cell / "edit_00002.safetensors").write_bytes(b"x")
    (cell / "look_000006.json").unlink()
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        study(model, records, tmp_path, methods=[ULTRA])
    assert not model.applied_edits


def test_single_methods_go_one_after_the_other(model, records, tmp_path) -> None:
    params = replace(ke.ROMEParams.preset("world"), v_num_grad_steps=2, mom2_adjustment=False)
    asked = dict(methods=["rome+history"], params=None, params_of={"rome": params}, edits=4, batch=2, untouched=0)
    made = study(model, records, tmp_path, **asked)
    edits = [ke.Edit.load(path) for path in sorted((tmp_path / "cells").rglob("edit_*.safetensors"))]
    assert [len(edit.requests) for edit in edits] == [2, 2]
    assert [len(edit.parts) for edit in edits] == [2, 2] and [row["edits"] for row in made.rows] == [0, 2, 4]


@pytest.mark.parametrize(
    "label, error",
    [
        ("memit+histori", "expected METHOD"),
        ("mmit", "unknown method 'mmit'"),
        ("ft+history:layers=3", "ft has no history"),
        ("memit:mu", "'mu' is no parameter=value: parameters are layers"),
        ("memit:nu=1", "'nu=1' is no parameter=value"),
        ("memit:mu=1,mu=2", "update_norm_lambda is given twice"),
        ("memit:mu=-1", "update_norm_lambda is -1"),
        ("memit:layers=x", r"layers\[0\] is 'x'"),
    ],
)
def test_bad_methods(label: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Treatment.of(label, None, {"memit": "world", "ft": {"layers": [1]}})


def test_methods_as_they_are_named() -> None:
    made = Treatment.of("memit+history:mu=1,layers=1-3,lambda=2e2", "world", {})
    assert made.history and made.label == "memit+history:mu=1,layers=1-3,lambda=2e2"
    assert made.params == replace(
        ke.MEMITParams.preset("world"), update_norm_lambda=1.0, layers=(1, 2, 3), mom2_update_weight=200.0
    )
    assert Treatment.of("rome:layers=2/4", "world", {}).params.layers == (2, 4)
    assert not Treatment.of("rome:mom2_adjustment=false", "world", {}).uses_moments


@pytest.mark.parametrize(
    "asked, error",
    [
        (dict(methods=[]), "no methods"),
        (dict(methods=[ULTRA, "ultraedit+history:lr=2e-3"]), "are the same"),
        (dict(params=None), "no parameters of ultraedit"),
        (dict(methods=["memit"]), "'memit' needs moments of layer 1"),
        (dict(methods=["ultraedit:layers=9"]), "layer 9 is not one of 6"),
        (dict(edits=30), "30 edits and 5 untouched facts asked for, but there are 20"),
        (dict(batch=8), "batch is 8: there are 7 edits"),
        (dict(untouched_records=load_world().records()[20:22]), "5 untouched facts asked for, but there are 2"),
        (dict(text=["a"]), "no text has two tokens"),
        (dict(seeds=[-1]), "at least 0"),
        (dict(seeds=[0, 0]), "two cells of the study are called"),
    ],
)
def test_bad_input_comes_before_any_work(model, records, tmp_path, asked, error) -> None:
    with pytest.raises(ValueError, match=error):
        study(model, records, tmp_path / "out", **asked)
    assert not list(tmp_path.rglob("edit_*")) and not model.applied_edits


def test_two_ranks_share_the_cells(model, records, tmp_path) -> None:
    study(model, records, tmp_path / "one", seeds=[0, 1])
    finish(fork(SCRIPT, tmp_path / "two", ranks=2))
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")


def test_intervals_are_students() -> None:
    spread = Spread.of([1.0, 2.0, 6.0])
    assert (spread.mean, spread.least, spread.most, spread.n) == (3.0, 1.0, 6.0, 3)
    assert spread.half_width == pytest.approx(4.302653 * math.sqrt(7.0) / math.sqrt(3.0))
    assert Spread.of([4.0]).half_width is None


def test_differences_pair_the_seeds(model, records, tmp_path) -> None:
    made = study(model, records, tmp_path, seeds=[0, 1])
    by = {(row["method"], row["seed"]): row["growth"] for row in made.rows if row["edits"] == 6}
    want = Spread.of([by[TWO[0], seed] - by[TWO[1], seed] for seed in (0, 1)])
    assert made.difference(*TWO, "growth", 6) == want
    with pytest.raises(ValueError, match="no seed has 'growth'"):
        made.difference(*TWO, "growth", 5)
