"""General ability: lm-eval's numbers on a task of local data against a plain loop; what is refused."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.extras import MissingExtraError
from knowedit_ext.studies import sequential
from knowedit_ext.world import load_world

TASK = """
task: local_facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return ke.load_model(load_world().folder, dtype="float32")


@pytest.fixture(scope="module")
def edit(model: ke.EditableModel) -> ke.Edit:
    return ke.finetune(model, load_world().records()[:2], ke.FTParams.preset("world"))


def questions(count: int = 9) -> list[dict]:
    """Which of two objects, in either order."""
    asked = []
    for number, record in enumerate(load_world().records()[:count]):
        rewrite = record["requested_rewrite"]
        choices = [rewrite["target_true"]["str"], rewrite["target_new"]["str"]]
        label = number % 2
        prompt = rewrite["prompt"].format(rewrite["subject"])
        asked.append({"prompt": prompt, "choices": choices[::-1] if label else choices, "label": label})
    return asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, questions())))
    (folder / "facts.yaml").write_text(TASK.format(file=folder / "facts.jsonl"))
    return folder


def plain_accuracy(model: ke.EditableModel, asked: list[dict]) -> float:
    """Share of questions whose right choice is the likelier one behind a space, all its tokens together."""
    right = 0
    for question in asked:
        start = len(model.tokenizer(question["prompt"])["input_ids"])
        scores = []
        for choice in question["choices"]:
            ids = model.tokenizer(f"{question['prompt']} {choice}")["input_ids"]
            with torch.no_grad():
                logp = model.hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logp[n - 1, ids[n]]) for n in range(start, len(ids))))
        right += scores[question["label"]] > scores[1 - question["label"]]
    return right / len(asked)


def test_a_task_of_local_data_before_and_with_an_edit(model: ke.EditableModel, edit: ke.Edit, folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="general ability needs lm-eval (extra lm-eval)")
    padding, state = model.tokenizer.pad_token, random.getstate()
    weights = {name: p.clone() for name, p in model.hf.named_parameters()}
    found = ke.ability(model, ["local_facts"], edit, tasks_folder=folder, texts=load_world().fillers(3), batch=4)
    want = [plain_accuracy(model, questions())]
    with edit.applied(model):
        want.append(plain_accuracy(model, questions()))
    assert want[0] > want[1]  # two facts are others now
    assert [side["local_facts"]["acc"] for side in (found.before, found.after)] == pytest.approx(want)
    assert found.before["perplexity"]["perplexity"] != found.after["perplexity"]["perplexity"]
    assert all(torch.equal(p, weights[name]) for name, p in model.hf.named_parameters())
    assert model.tokenizer.pad_token == padding and random.getstate() == state
    assert f"{want[1] - want[0]:+.4g}" in found.table()


def test_fewer_questions(model: ke.EditableModel, folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="general ability needs lm-eval (extra lm-eval)")
    found = ke.ability(model, ["local_facts"], tasks_folder=folder, limit=3)
    assert found.after is None
    assert found.before["local_facts"]["acc"] == pytest.approx(plain_accuracy(model, questions(3)))


def test_in_a_study_of_sequential_edits(model: ke.EditableModel, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="general ability needs lm-eval (extra lm-eval)")
    records = load_world().records()[:8]
    options = dict(params="world", edits=4, batch=2, untouched=2, tasks=["local_facts"], tasks_folder=folder)
    study = sequential(model, records, ["ultraedit"], tmp_path / "out", **options)
    first, *_, last = study.rows
    assert first["tasks"] == {"local_facts acc": pytest.approx(plain_accuracy(model, questions()))}
    parts = [ke.Edit.load(path) for path in sorted((tmp_path / "out").glob("cells/*/edit_*.safetensors"))]
    with ke.Edit.merge(parts).applied(model):
        assert last["tasks"]["local_facts acc"] == pytest.approx(plain_accuracy(model, questions()))
    assert "local_facts acc" in study.table() and "local_facts acc" in study.csv()
    (folder / "more.txt").write_text("other questions")
    with pytest.raises(ValueError, match="tasks"):
        sequential(model, records, ["ultraedit"], tmp_path / "out", **options)
    (folder / "more.txt").unlink()


def test_unknown_tasks_are_named_with_what_is_near(model: ke.EditableModel, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="general ability needs lm-eval (extra lm-eval)")
    with pytest.raises(ValueError, match="no task 'local_fact': near to it are local_facts"):
        ke.ability(model, ["local_fact"], tasks_folder=folder)
    with pytest.raises(ValueError, match="no task"):
        sequential(model, load_world().records()[:8], ["ultraedit"], tmp_path / "out", params="world", tasks=["?"])
    assert not (tmp_path / "out").exists()


def test_perplexity_needs_no_package(model: ke.EditableModel, edit: ke.Edit, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = ke.ability(model, edit=edit, texts=load_world().fillers(3))
    assert list(found.before) == list(found.after) == ["perplexity"]
    found.save(tmp_path / "ability.json")
    assert json.loads((tmp_path / "ability.json").read_text()) == found.to_dict()
    with pytest.raises(MissingExtraError, match=r"lm-eval.*pip install"):
        ke.ability(model, ["local_facts"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to measure"),
        ({"tasks": "local_facts"}, "expected a list"),
        ({"tasks": ["a"], "tasks_folder": "nowhere"}, "no folder of tasks 'nowhere'"),
        ({"texts": ["x"]}, "nothing to predict"),
    ],
)
def test_refused(model: ke.EditableModel, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ke.ability(model, **options)
