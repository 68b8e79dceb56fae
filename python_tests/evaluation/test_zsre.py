"""zsRE: accuracies of an answer's tokens, against the published loop and against plain teacher forcing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.datasets import load_zsre
from knowedit_ext.world import load_world

QUESTION = {
    "loc": "nq question: who lives in Boston",
    "loc_ans": "Nobody at all",
    "alt": "Lisbon",
    "portability": {"New Question": "What is the city called?", "New Answer": "Lisbon"},
}


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return ke.load_model(load_world().folder, dtype="float32")


def some_records() -> list[dict]:
    facts = load_world().facts()[:4]
    return [
        {
            "subject": fact["subject"],
            "src": fact["prompt"],
            "rephrase": "In short, " + fact["prompt"],
            "answers": [fact["attribute"] + end],
            **QUESTION,
        }
        for fact, end in zip(facts, ["", " and Rome", " é", ""], strict=True)
    ]


@torch.no_grad()
def published(model: ke.EditableModel, record: dict) -> dict[str, list[bool]]:
    """eval_utils_zsre.py: each token of the answer behind the text of those before it."""
    tokenizer = model.tokenizer

    def right(prompt: str, answer: str) -> list[bool]:
        tokens = tokenizer(" " + answer).input_ids
        hits = []
        for n, token in enumerate(tokens):
            ids = tokenizer(prompt + tokenizer.decode(tokens[:n])).input_ids
            wanted = tokenizer(tokenizer.decode([token])).input_ids[0]
            hits.append(int(model.hf(torch.tensor([ids])).logits[0, -1].argmax()) == wanted)
        return hits

    rewrite = record["requested_rewrite"]
    new = rewrite["target_new"]["str"]
    prompt = rewrite["prompt"].replace("{}", rewrite["subject"])
    return {
        "rewrite_prompts_correct": right(prompt, new),
        "paraphrase_prompts_correct": [x for text in record["paraphrase_prompts"] for x in right(text, new)],
        "neighborhood_prompts_correct": [
            x for near in record["neighborhood_prompts"] for x in right(near["prompt"], near["target"])
        ],
    }


def test_reference_equals_the_published_loop(model: ke.EditableModel) -> None:
    records = load_zsre(some_records())
    report = ke.evaluate(model, records, compat="reference")
    assert any(any(case["pre"]["rewrite_prompts_correct"]) for case in report.cases)
    for case, record in zip(report.cases, records, strict=True):
        assert published(model, record).items() <= case["pre"].items()


@torch.no_grad()
def test_tokens_are_teacher_forced(model: ke.EditableModel) -> None:
    records = load_zsre(some_records())
    report = ke.evaluate(model, records)
    for case, record in zip(report.cases, records, strict=True):
        rewrite = record["requested_rewrite"]
        prompt = rewrite["prompt"].replace("{}", rewrite["subject"])
        ids = model.tokenizer(prompt + " " + rewrite["target_new"]["str"]).input_ids
        first = len(model.tokenizer(prompt).input_ids)
        predicted = model.hf(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        assert case["pre"]["rewrite_prompts_correct"] == [predicted[t - 1] == ids[t] for t in range(first, len(ids))]


def test_table_and_portability(model: ke.EditableModel) -> None:
    raw = [{**record, "answers": ["Lisbon"]} for record in some_records()]
    report = ke.evaluate(model, raw)  # told from their keys
    row = report.summary("pre")
    assert {"S", "EA", "PA", "NA", "port."} <= set(row) and "ES" not in row
    assert row["port."].n == 4
    assert "| model | n | S | EA | PA | NA | port. |" in report.table()


def test_real_records(model: ke.EditableModel, data_dir: Path) -> None:
    records = load_zsre(data_dir / "zsre_mend_eval_1037.json", limit=5)
    report = ke.evaluate(model, records, compat="reference")
    for case, record in zip(report.cases, records, strict=True):
        assert published(model, record).items() <= case["pre"].items()
