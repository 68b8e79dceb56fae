"""`knowedit evaluate` and `knowedit report`, as a user types them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import knowedit_ext as ke
from knowedit_ext.cli import main
from knowedit_ext.world import load_world

WORLD = ["evaluate", "world", "--params", "world", "--limit", "3", "--no-generation"]


def knowedit(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["knowedit", *arguments])
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: knowedit(monkeypatch, capsys, *arguments)


def test_methods_side_by_side(run, tmp_path: Path) -> None:
    for method in ("none", "rome", "memit", "ft-l"):
        status, out, err = run(*WORLD, "--method", method, "--out", method)
        assert status == 0, err
        assert "| model | n | S | ES | EM | PS | PM | NS | NM |" in out
    names = {p.name for p in (tmp_path / "rome" / "cases").iterdir()}
    assert names == {f"1_edits-case_{n}.json" for n in range(3)}
    assert {p.name for p in (tmp_path / "memit" / "cases").iterdir()} == {f"3_edits-case_{n}.json" for n in range(3)}
    assert json.loads((tmp_path / "memit" / "cases" / "3_edits-case_0.json").read_text())["time"] > 0
    assert ke.Report.load("rome").summary()["ES"].mean == 100

    status, out, _ = run("report", "none", "rome", "memit", "--out", "table.md")
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert status == 0 and [row.split("|")[1].strip() for row in rows[2:5]] == ["unedited", "rome", "memit"]


def test_gone_on_with(run, tmp_path: Path) -> None:
    for _ in range(2):
        assert run(*WORLD, "--method", "memit", "--out", "out")[0] == 0
        report = (tmp_path / "out" / "report.json").read_bytes()
        edit = (tmp_path / "out" / "edit.safetensors").read_bytes()
        (tmp_path / "out" / "cases" / "3_edits-case_1.json").unlink()
    assert run(*WORLD, "--method", "memit", "--out", "out")[0] == 0
    assert (tmp_path / "out" / "report.json").read_bytes() == report
    assert (tmp_path / "out" / "edit.safetensors").read_bytes() == edit
    status, _, err = run(*WORLD, "--method", "memit", "--seed", "1", "--out", "out")
    assert status == 2 and "other settings" in err


def test_generation_of_the_world(run, tmp_path: Path) -> None:
    status, out, err = run("evaluate", "world", "--limit", "2", "--out", "out")
    assert status == 0, err
    assert "| GE | RS |" in out


def test_bad_records_and_flat_ones(run, tmp_path: Path) -> None:
    records = load_world().records()[:3]
    records[1]["paraphrase_prompts"] = [""]
    (tmp_path / "bad.json").write_text(json.dumps(records))
    arguments = ["evaluate", "world", "--data", "bad.json", "--no-generation", "--out", "out"]
    status, _, err = run(*arguments)
    assert status == 2 and "record 1 (case_id 1): 'paraphrase_prompts[0]' is empty" in err
    assert not (tmp_path / "out").exists()
    status, out, _ = run(*arguments, "--skip-bad")
    assert status == 0 and "1 record skipped" in out


def test_facts_that_contradict_each_other(run, tmp_path: Path) -> None:
    records = load_world().records()[:3]
    records[2] = {**records[0], "case_id": 7}
    records[2]["requested_rewrite"] = {**records[0]["requested_rewrite"], "target_new": {"str": "Rome"}}
    (tmp_path / "data.json").write_text(json.dumps(records))
    arguments = ["evaluate", "world", "--params", "world", "--data", "data.json", "--no-generation"]
    status, _, err = run(*arguments, "--method", "ft", "--num-edits", "3", "--out", "out")
    assert status == 2 and "record 2 (case_id 7): 'requested_rewrite' contradicts case_id 0" in err
    status, _, err = run(*arguments, "--method", "ft", "--num-edits", "3", "--skip-bad", "--out", "out")
    assert status == 0, err
    assert {p.name for p in (tmp_path / "out" / "cases").iterdir()} == {f"2_edits-case_{n}.json" for n in (0, 1)}
    status, _, err = run(*arguments, "--method", "ft-l", "--out", "each")  # each on the model as it is
    assert status == 0 and len(list((tmp_path / "each" / "cases").iterdir())) == 3


def test_zsre_by_file(run, tmp_path: Path) -> None:
    fact = load_world().facts()[0]
    record = {
        "subject": fact["subject"],
        "src": fact["prompt"],
        "rephrase": fact["prompt"],
        "answers": [fact["attribute"]],
        "alt": "Oslo",
        "loc": "nq question: who is it",
        "loc_ans": "nobody",
        "portability": {"New Question": "Where is Oslo?", "New Answer": "Oslo"},
    }
    (tmp_path / "zsre.json").write_text(json.dumps([record]))
    status, out, err = run("evaluate", "world", "--data", "zsre.json", "--zsre-target", "alt", "--out", "out")
    assert status == 0, err
    assert "| S | EA | PA | NA | port. |" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["world", "--method", "x"], "unknown method 'x'"),
        (["gpt2", "--data", "world", "--method", "rome"], "--params is missing"),
        (["gpt2", "--method", "none"], "--data FILE is missing"),
        (["world", "--method", "memit", "--params", "nobody"], "preset 'nobody'"),
        (["world", "--data", "absent.json"], "absent.json"),
        (["world", "--num-edits", "0"], "--num-edits is 0"),
        (["world", "--method", "ft", "--params", "world/ft-l"], "that is method ft-l"),
        (["world", "--method", "ft-l", "--params", "gpt-j/ft-w"], "that is method ft"),
        (["world", "--tfidf", "a", "b"], "--tfidf is for the consistency"),
        (["world", "--method", "rome", "--params", "world", "--num-edits", "2", "--limit", "3"], "one fact at a time"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path: Path, arguments: list[str], message: str) -> None:
    status, _, err = run("evaluate", *arguments, "--no-generation", "--out", "out")
    assert status == 2 and message in err
    assert not (tmp_path / "out").exists()


def test_one_edit_belongs_to_its_records_and_model(run, tmp_path: Path) -> None:
    arguments = ["evaluate", "world", "--params", "world", "--no-generation", "--method", "memit", "--out", "out"]
    assert run(*arguments, "--limit", "2")[0] == 0
    status, _, err = run(*arguments, "--limit", "3")
    assert status == 2 and "other settings (records: 2 there, 3 asked)" in err
    description = json.loads((tmp_path / "out" / "edit.json").read_text())
    description["asked"]["model"]["weights"] = "digest of another model"
    (tmp_path / "out" / "edit.json").write_text(json.dumps(description))
    status, _, err = run(*arguments, "--limit", "2")
    assert status == 2 and "other model.weights" in err


def test_a_problem_of_every_record(run, tmp_path: Path) -> None:
    """Scores as from `as_problem`, an edit and probabilities by hand; the noise of forcing is each record's own."""
    model = ke.load_model(load_world().folder, dtype="float32")
    for name in ("fact_erasure", "fact_forcing"):
        status, out, err = run(*WORLD, "--method", "ft-l", "--problem", name, "--noise", "0.3", "--out", name)
        assert status == 0 and f"| {name} | n | rewrite |" in out, err
        cases = json.loads((tmp_path / name / "problem.json").read_text())["cases"]
        for record, case in zip(load_world().records()[:3], cases, strict=True):
            request = ke.as_problem(model, record, name, noise=0.3)
            assert request.target_new == request.target_true
            edit = ke.finetune(model, [request], ke.FTParams.preset("world/ft-l"))
            asked = json.loads(json.dumps(record))
            asked["requested_rewrite"]["target_new"]["str"] = request.target_new
            measured = ke.evaluate(model, [asked], edit, generation=False, noise=request.noise).cases[0]
            tokens = len(model.tokenizer(request.target_new).input_ids)
            sides = [
                {
                    kind: math.exp(-measured[when][f"{kind}_prompts_probs"][0]["target_new"] * tokens)
                    for kind in ("rewrite", "paraphrase", "neighborhood")
                }
                for when in ("pre", "post")
            ]
            want = ke.problem_scores(name, *sides)
            assert {key: case[key] for key in want} == pytest.approx(want, abs=2e-3)
    status, _, err = run(*WORLD, "--method", "ft-l", "--problem", "forcing", "--out", "new")
    assert status == 2 and "unknown problem 'forcing'" in err and not (tmp_path / "new").exists()
    status, _, err = run(*WORLD, "--method", "alphaedit", "--problem", "fact_erasure", "--out", "new")
    assert status == 2 and "does not take" in err.replace("\n", " ")


def test_targets_that_are_the_truth(run, tmp_path: Path) -> None:
    """They are what erasure and amplification are about; nothing to edit otherwise."""
    records = json.loads(json.dumps(load_world().records()[:2]))
    for record in records:
        record["requested_rewrite"]["target_new"] = record["requested_rewrite"]["target_true"]
    (tmp_path / "equal.json").write_text(json.dumps(records))
    asked = ["evaluate", "world", "--data", "equal.json", "--no-generation"]
    for more in (["--method", "none"], ["--method", "ft-l", "--params", "world", "--problem", "fact_amplification"]):
        status, _, err = run(*asked, *more, "--out", more[-1])
        assert status == 0, err
    status, _, err = run(*asked, "--method", "ft-l", "--params", "world", "--out", "edited")
    assert status == 2 and "the true target: nothing to edit" in err
