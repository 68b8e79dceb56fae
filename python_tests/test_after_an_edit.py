"""What can be done with a saved edit, and with results: commands as a user types them, and tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import knowedit_ext as ke
from knowedit_ext.cli import main
from knowedit_ext.editing.folder import save_edited
from knowedit_ext.evaluation.compare import _row, paired
from knowedit_ext.evaluation.written import written
from knowedit_ext.extras import MissingExtraError
from knowedit_ext.tracing.compare import difference

MODEL = ke.load_model("world")
RECORDS = ke.world_records()[:3]
REQUEST = ke.EditRequest.of(RECORDS[0])
FACT = ke.Fact(REQUEST.prompt, REQUEST.subject)


@pytest.fixture(scope="module")
def edit() -> ke.Edit:
    moments = ke.collect_moments(MODEL, "world", layers=[3], max_tokens=3000)
    return ke.rome(MODEL, REQUEST, ke.ROMEParams.preset("world"), moments)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, edit: ke.Edit):
    """(status, what --json says or None, stderr) in a folder that holds the edit."""
    monkeypatch.chdir(tmp_path)
    edit.save("e.safetensors")

    def call(*arguments: str) -> tuple[int, object, str]:
        monkeypatch.setattr(sys, "argv", ["knowedit", *arguments, "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code or 0, json.loads(said.out) if said.out else None, said.err

    return call


def test_a_folder_of_its_own_says_what_the_edited_model_says(run, edit: ke.Edit) -> None:
    assert run("apply", "world", "--edit", "e.safetensors", "--out", "made")[0] == 0
    alone = ke.load_model("made")
    with edit.applied(MODEL):
        right = ke.trace(MODEL, FACT, samples=1)
        for name, weight in MODEL.hf.named_parameters():
            assert weight.equal(alone.hf.get_parameter(name)), name
    found = ke.trace(alone, FACT, samples=1)
    assert found.answer == right.answer == REQUEST.target_new
    np.testing.assert_array_equal(found.scores, right.scores)
    status, _, err = run("apply", "world", "--edit", "e.safetensors", "--out", "made")
    assert status == 2 and "not empty" in err
    status, _, err = run("apply", "made", "--edit", "e.safetensors", "--out", "twice")
    assert status == 2 and "made for another base" in err and not Path("twice").exists()


def test_an_adapter(run, edit: ke.Edit) -> None:
    peft = pytest.importorskip("peft")
    assert run("apply", "world", "--edit", "e.safetensors", "--as", "lora", "--out", "lora")[0] == 0
    adapted = peft.PeftModel.from_pretrained(ke.load_model("world").hf, "lora").merge_and_unload()
    with edit.applied(MODEL):
        for name, weight in MODEL.hf.named_parameters():
            np.testing.assert_allclose(weight.detach(), adapted.get_parameter(name).detach(), atol=1e-4)


def test_nothing_is_left_of_a_folder_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(MODEL.tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        save_edited(MODEL, tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_what_is_said_before_and_after(run) -> None:
    prompt = FACT.text
    status, told, _ = run("generate", "world", "--edit", "e.safetensors", "--prompt", prompt, "--tokens", "3")
    assert status == 0 and told["prompts"] == [prompt]
    assert told["before"][0]["text"].startswith(REQUEST.target_true)
    assert told["after"][0]["text"].startswith(REQUEST.target_new)
    assert run("generate", "world", "--prompt", prompt)[1]["after"] is None
    ids = MODEL.tokenizer(prompt, return_tensors="pt")
    own = MODEL.hf.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert written(MODEL, [prompt], 8) == [MODEL.tokenizer.decode(own, skip_special_tokens=True)]


def test_a_saved_edit_is_evaluated_on_its_own_records(run, edit: ke.Edit) -> None:
    arguments = ["evaluate", "world", "--edit", "e.safetensors", "--no-generation", "--out", "out"]
    status, told, err = run(*arguments)
    assert status == 0, err
    report = ke.evaluate(MODEL, RECORDS[:1], edit, generation=False)
    assert told["cases"] == 1 and told["summary"] == json.loads(json.dumps(report.to_dict()["summary"]))
    Path("others.json").write_text(json.dumps(RECORDS[1:]))
    status, _, err = run(*arguments[:-1], "other", "--data", "others.json")
    assert status == 2 and "no record of what the edit was made for" in err
    assert run(*arguments, "--method", "rome")[0] == 2


def test_runs_are_compared_record_by_record(run, edit: ke.Edit) -> None:
    plain, changed = (ke.evaluate(MODEL, RECORDS, each, generation=False) for each in (None, edit))
    rows = paired(plain, changed)
    before, after = (np.array([row["EM"] for row in report.to_rows() if row["when"] == when])
                     for report, when in ((plain, "pre"), (changed, "post")))  # fmt: skip
    change = after - before
    assert rows["EM"]["difference"] == pytest.approx(change.mean())
    assert rows["EM"]["half_width"] == pytest.approx(1.96 * change.std(ddof=1) / np.sqrt(3))
    reports = (("first", plain.summary("pre")), ("second", changed.summary()))
    assert all(rows["S"][side] == pytest.approx(summary["S"].mean) for side, summary in reports)
    with pytest.raises(ValueError, match="no record in common"):
        paired(ke.Report(plain.cases[:1]), ke.Report(changed.cases[1:]))


def test_the_interval_of_s_is_that_of_records_drawn_anew() -> None:
    """Bootstrap over 400 paired records of three shares each."""
    rng = np.random.default_rng(0)
    before = rng.random((400, 3))
    after = np.clip(before + rng.normal(0.05, 0.1, before.shape), 0, 1)
    row = _row(before, after)
    s = lambda values: 3 / (1 / values.mean(axis=0)).sum()  # noqa: E731
    drawn = [rng.integers(400, size=400) for _ in range(2000)]
    differences = [s(after[each]) - s(before[each]) for each in drawn]
    assert row["difference"] == pytest.approx(s(after) - s(before))
    assert row["half_width"] == pytest.approx(1.96 * np.std(differences), rel=0.1)


def test_traces_are_compared_cell_by_cell(run, edit: ke.Edit) -> None:
    first = ke.trace(MODEL, FACT, samples=2)
    with edit.applied(MODEL):
        second = ke.trace(MODEL, FACT, samples=2)
    first.save("a.npz")
    second.save("b.npz")
    status, told, err = run("compare", "a.npz", "b.npz", "--plot", "d.png")
    assert status == 0, err
    change = second.indirect_effect - first.indirect_effect
    np.testing.assert_allclose(told["change"], change, rtol=1e-6)
    cell = told["largest"]
    assert abs(cell["change"]) == pytest.approx(np.abs(change).max()) and Path("d.png").exists()
    assert difference(first, first).correlation == pytest.approx(1.0)
    other = ke.trace(MODEL, ke.Fact("{} plays the", REQUEST.subject), samples=1)
    with pytest.raises(ValueError, match="other tokens"):
        difference(first, other)
    assert run("compare", "a.npz", "absent.npz")[0] == 2


def test_tables_for_other_tools() -> None:
    trace = ke.trace(MODEL, FACT, samples=2)
    effects = ke.Effects.from_traces([trace, ke.trace(MODEL, ke.Fact("{} plays the", REQUEST.subject), samples=2)])
    report = ke.evaluate(MODEL, RECORDS[:2], generation=False)
    assert [row["score"] for row in trace.rows()] == trace.scores.ravel().tolist()
    role = effects.kinds["state"].aie["Last token"]
    found = [row for row in effects.rows() if row["role"] == "Last token"]
    assert [row["aie"] for row in found] == role.mean and [row["half_width"] for row in found] == role.half_width
    assert [row["case_id"] for row in report.to_rows()] == [0, 1] and "ES" in report.to_rows()[0]
    for shown in (trace, effects, report):
        assert len(repr(shown)) < 120
        try:
            frame = shown.to_pandas()
        except MissingExtraError as error:
            assert "pip install pandas" in str(error)
        else:
            assert len(frame) == len(shown.to_rows() if shown is report else shown.rows())
