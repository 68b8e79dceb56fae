"""Data sets with questions of their own: what is asked of the model, against plain teacher forcing; and the rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.cli import main
from knowedit_ext.datasets import load_knowedit, load_mquake, load_rippleedits
from knowedit_ext.datasets.questions import Score
from knowedit_ext.evaluation.methods import Editing
from knowedit_ext.evaluation.metrics import METRICS
from knowedit_ext.world import load_world

FACTS = load_world().facts()
RAW = load_world().records()


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return ke.load_model(load_world().folder, dtype="float32")


@torch.no_grad()
def share(model: ke.EditableModel, prompt: str, *answers: str) -> float:
    """Of the answer's tokens how many are the likeliest, of the alias that fits best: token by token, no cache."""
    best = 0.0
    for answer in answers:
        ids, first = model.tokenizer(f"{prompt} {answer}").input_ids, len(model.tokenizer(prompt).input_ids)
        said = model.hf(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        best = max(best, sum(said[t - 1] == ids[t] for t in range(first, len(ids))) / (len(ids) - first))
    return best


def knowedit(number: int) -> dict[str, Any]:
    fact, other = FACTS[number], FACTS[number + 50]
    near = [{"prompt": other["prompt"], "ground_truth": [["Nowhere at all", other["attribute"]]]}]
    return {
        "subject": fact["subject"],
        "prompt": fact["prompt"],
        "target_new": ["Rome"],
        "ground_truth": [fact["attribute"]],
        "rephrase_prompt": "In short, " + fact["prompt"],
        "portability": {"Subject_Aliasing": [{"prompt": fact["prompt"], "ground_truth": ["Rome", "Rome, Italy"]}]},
        "locality": {"Relation_Specificity": near, "Forgetfulness": near},
    }


def test_knowedit_and_its_groups(model: ke.EditableModel) -> None:
    raw = [knowedit(n) for n in range(3)]
    report = ke.evaluate(model, raw)
    for case, record in zip(report.cases, raw, strict=True):
        near = record["locality"]["Relation_Specificity"][0]
        assert case["pre"]["rewrite_prompts_correct"] == [share(model, record["prompt"], "Rome")]
        wanted = share(model, near["prompt"], *near["ground_truth"][0])
        assert case["pre"]["forgetfulness_prompts_correct"] == [wanted] == [1.0]
        assert case["pre"]["rewrite_prompts_probs"][0].keys() == {"target_new", "target_true"}
    row = report.summary("pre")
    assert {"ES", "PS", "EA", "PA", "port. alias", "loc. relation", "loc. forget"} <= set(row) and "NS" not in row
    assert row["ES"].mean == 0 and row["loc. relation"].mean == 100
    assert "3 records without neighborhood_prompts" in report.table()


def test_what_an_edit_keeps(model: ke.EditableModel) -> None:
    """`loc. kept` compares what is said with what was said: of the edited model alone, where the other was measured."""
    raw = [
        knowedit(0) | {"locality": {"Relation_Specificity": [{"prompt": FACTS[0]["prompt"], "ground_truth": "Rome"}]}}
    ]
    edit = ke.edit(model, load_knowedit(raw), "ft", params="world")
    report = ke.evaluate(model, raw, edit)
    assert "loc. kept" not in report.summary("pre") and report.summary()["EA"].mean == 100
    assert report.summary()["loc. kept"].mean < 100 == report.summary()["loc. relation"].mean
    untouched = ke.evaluate(model, [raw[0] | knowedit(1)], ke.Edit({}, "none"))
    assert untouched.summary()["loc. kept"].mean == 100
    assert "loc. kept" not in ke.evaluate(model, raw, edit, baseline=False).summary()


def mquake(number: int = 0) -> dict[str, Any]:
    first, second = RAW[number], RAW[number + 7]
    old = first["requested_rewrite"]["target_true"]["str"]
    prompt = first["requested_rewrite"]["prompt"].replace("{}", first["requested_rewrite"]["subject"])
    hop = {"question": "?", "cloze": prompt, "answer": old, "answer_alias": []}
    return {
        "case_id": f"m{number}",
        "requested_rewrite": [first["requested_rewrite"], second["requested_rewrite"]],
        "questions": ["What is it?", prompt],
        "answer": "Nowhere at all",
        "answer_alias": [old],
        "new_answer": first["requested_rewrite"]["target_new"]["str"],
        "new_answer_alias": [],
        "new_single_hops": [hop, hop],
    }


def test_mquake_before_and_after(model: ke.EditableModel, tmp_path: Path) -> None:
    """Any question, any alias; a record's facts are edited together, or, by methods of one fact, one by one."""
    moments = ke.collect_moments(model, load_world().statements()[:800], [0, 1, 2, 3])
    for name in ("rome", "memit"):
        edits = Editing(model, name, "world", moments)
        out = tmp_path / name
        report = ke.evaluate(model, [mquake(0), mquake(1)], edits, out=out)
        before, after = report.summary("pre"), report.summary()
        assert (before["multi-hop"].mean, before["old answer"].mean, before["all hops"].mean) == (0, 100, 100)
        assert (after["multi-hop"].mean, after["all hops"].mean, after["EA"].mean) == (100, 0, 100)
        assert report.cases[0]["post"]["rewrite_prompts_correct"] == [1.0, 1.0]
        assert ke.Report.load(out).summary() == after and "; " in report.worst()[0]["prompt"]
    assert len(ke.edit(model, mquake(0), "memit", params="world", moments=moments).requests) == 2


def ripple(number: int = 0) -> dict[str, Any]:
    """Its subject and target have to be told from sentences and queries."""
    fact, other = FACTS[number], next(x for x in FACTS[number + 1 :] if x["subject"] == FACTS[number]["subject"])
    new = RAW[number]["requested_rewrite"]["target_new"]["str"]
    about = {"subject_id": "Q1", "query_type": "regular", "phrase": None}
    kept = {"prompt": other["prompt"], "answers": [{"value": other["attribute"], "aliases": ["x"]}], **about}
    now = {"prompt": fact["prompt"], "answers": [{"value": new, "aliases": []}], "target_ids": ["Q2"], **about}
    unknown = {"prompt": other["prompt"], "answers": [{"value": "Nowhere", "aliases": []}], **about}
    return {
        "example_type": "popular",
        "edit": {
            "prompt": f"{fact['prompt']} {new}.",
            "subject_id": "Q1",
            "target_id": "Q2",
            "original_fact": {"prompt": f"{fact['prompt']} {fact['attribute']}."},
        },
        "Relation_Specificity": [{"test_queries": [kept], "test_condition": "OR", "condition_queries": [kept]}],
        "Logical_Generalization": [{"test_queries": [now, unknown], "test_condition": "AND", "condition_queries": []}],
        "Subject_Aliasing": [{"test_queries": [now], "test_condition": "OR", "condition_queries": []}],
        "Forgetfulness": [{"test_queries": [kept], "test_condition": "OR", "condition_queries": [unknown]}],
    }


def test_ripple_effects(model: ke.EditableModel) -> None:
    raw = [ripple(n) for n in range(2)]
    for record, loaded in zip(RAW, load_rippleedits(raw), strict=False):
        rewrite, own = loaded["requested_rewrite"], record["requested_rewrite"]
        assert (rewrite["prompt"], rewrite["subject"]) == (own["prompt"], own["subject"])
        assert [rewrite[k]["str"] for k in ("target_new", "target_true")] == [
            own[k]["str"] for k in ("target_new", "target_true")
        ]
    row = ke.evaluate(model, raw, Editing(model, "ft", "world")).summary()
    assert row["EA"].mean == row["rip. SA"].mean == 100 and row["rip. LG"].mean == 0
    assert row["rip. RS"].n == 2 and "rip. PV" not in row  # whose condition the unedited model does not know
    before = ke.evaluate(model, raw).summary("pre")
    assert (before["rip. SA"].mean, before["rip. RS"].mean) == (0, 100)
    with pytest.raises(ValueError, match="measured on the unedited model: baseline=False"):
        ke.evaluate(model, raw, ke.Edit({}, "none"), baseline=False)


SENTENCE = "The name of the mother of Plato is Ann Lee."
FATHER = {
    "prompt": "The name of the father of Plato is",
    "subject_id": "Q1",
    "answers": [{"value": "Bo", "aliases": []}],
}
TESTS = [{"test_queries": [FATHER], "test_condition": "OR", "condition_queries": []}]


def told(old: str | None = None, **more: Any) -> dict[str, Any]:
    """What is told of the sentence's subject and target."""
    edit = {"prompt": SENTENCE, "subject_id": "Q1", "target_id": "Q2", **more.pop("edit", {})}
    edit |= {} if old is None else {"original_fact": {"prompt": old}}
    return load_rippleedits([{"edit": edit, "Relation_Specificity": TESTS, **more}])[0]["requested_rewrite"]


def test_names_that_are_told() -> None:
    rewrite = told("The name of the mother of Plato is Cy.")
    assert (rewrite["prompt"], rewrite["subject"]) == ("The name of the mother of {} is", "Plato")
    assert (rewrite["target_new"], rewrite["target_true"]) == ({"str": "Ann Lee"}, {"str": "Cy"})
    alias = FATHER | {"target_ids": ["Q2"], "answers": [{"value": "Ann Lee", "aliases": ["Lee"]}]}
    assert told(Subject_Aliasing=[{"test_queries": [alias]}])["target_new"] == {"str": "Ann Lee"}
    named = {"test_queries": [FATHER | {"answers": [{"value": "Ann Lee", "aliases": ["Lee", ""]}]}]}
    assert (
        told("The name of the mother of Plato is Ann Dee.", Subject_Aliasing=[named])["target_new"]["str"] == "Ann Lee"
    )
    assert told(edit={"target": "Ann Lee", "subject": "Plato"}, Relation_Specificity=[])["subject"] == "Plato"


def test_names_that_are_not_told_are_no_guess() -> None:
    with pytest.raises(ValueError, match="'edit.target' is missing, and the original fact does not tell"):
        told("The name of the mother of Plato is Ann Dee.")
    with pytest.raises(ValueError, match="'edit.target' is missing: .* has more names in it than 'Plato'"):
        told("The home of Plato is Isle of Man.", edit={"prompt": "The home of Plato is Isle of Dogs."})
    with pytest.raises(ValueError, match="'edit.target' is missing, and no answer"):
        told()
    with pytest.raises(ValueError, match="'edit.subject' is missing, and no other query"):
        told("The name of the mother of Plato is Cy.", Relation_Specificity=[])
    with pytest.raises(ValueError, match="does not end with the target 'Cy'"):
        told(edit={"target": "Cy"})


def test_wikibigedit(model: ke.EditableModel) -> None:
    fact, other = FACTS[0], FACTS[50]
    record = {"tag": "update", "subject": fact["subject"], "update": fact["prompt"], "ans": "Rome"}
    whole = record | {"rephrase": "In short, " + fact["prompt"], "personas": fact["prompt"], "mhop": fact["prompt"]}
    whole |= {"mhop_ans": fact["attribute"], "loc": other["prompt"], "loc_ans": other["attribute"]}
    row = ke.evaluate(model, [whole, record | {"mhop": None, "loc": "", "personas": None}]).summary("pre")
    assert {name: row[name].mean for name in ("EA", "NA", "port. persona", "port. hops")} == {
        **{"EA": 0, "NA": 100, "port. persona": 0, "port. hops": 100}
    }
    assert row["EA"].n == 2 and row["NA"].n == 1


def test_rules_of_tests() -> None:
    """any and all, conditions of the unedited model, and edits that have to take."""
    (metric,) = (m for m in METRICS if "multi-hop" in m.columns)
    query = {"prompt": "Anna has a", "target": "harp", "aliases": ["lyre"]}
    tests = [
        {"queries": [query, query], "any": True},
        {"queries": [query, query]},
        {"queries": [query], "conditions": [query]},
    ]
    rewrite = {"prompt": "{} plays the", "subject": "Anna", "target_new": {"str": "harp"}}
    record = {"requested_rewrite": rewrite, "tests": {"Forgetfulness": tests}, "needs_edit": True}
    questions, read = metric.ask(record, 0)
    assert [q.targets for q in questions] == [(" harp",)] + [(" harp", " lyre")] * 6
    no, yes = [Score(1.0, (True, False))] * 2, [Score(1.0, (False,)), Score(1.0, (True, True))]

    def passed(now: list, then: list | None = None) -> list[bool]:
        return read(now, then)["Forgetfulness_correct"]

    assert passed([yes, no, yes, no, yes, no, yes], [no] * 5 + [yes, no]) == [True, False, True]
    assert passed([yes, no, yes, yes, yes, yes, yes], [no] * 7) == [True, True]  # the condition was not known before
    assert passed([no, *[yes] * 6], [yes] * 7) == []  # the edit did not take
    assert passed([no, *[yes] * 6]) == [True, True, True]  # there was none
    assert metric.read({"Forgetfulness_correct": []}) == {}


def test_contradictions_within_a_record() -> None:
    bad = mquake()
    bad["requested_rewrite"][1] = bad["requested_rewrite"][0] | {"target_new": {"str": "Nowhere"}}
    with pytest.raises(ValueError, match=r"requested_rewrite\[1\].target_new.str' contradicts another target"):
        load_mquake([bad])


def test_noise_of_several_facts(model: ke.EditableModel) -> None:
    with pytest.raises(ValueError, match="noise is of the subject of one"):
        ke.evaluate(model, [mquake()], noise=0.1)


@pytest.mark.parametrize("name, records", [("knowedit", [knowedit(0), knowedit(1)]), ("mquake", [mquake()])])
def test_the_command(name: str, records: list, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("\n".join(map(json.dumps, records)))
    arguments = "evaluate world --data data.jsonl --method ft-l --params world --out out".split()
    monkeypatch.setattr("sys.argv", ["knowedit", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert not end.value.code, printed.err
    assert ("port. alias" if name == "knowedit" else "multi-hop") in printed.out
    assert json.loads(Path("out/report.json").read_text())["settings"]["dataset"] == name
