"""Which facts are known: greedy text and probability, against the model run token by token."""

from __future__ import annotations

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.evaluation.known import known_facts

from ..support.families import FAMILIES, tiny_model


@torch.no_grad()
def greedy(model: ke.EditableModel, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(model.hf(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[-count:]


@torch.no_grad()
def probability(model: ke.EditableModel, ids: list[int], target: list[int]) -> float:
    logp = model.hf(torch.tensor([ids + target[:-1]]), use_cache=False).logits[0].log_softmax(-1)
    return float(sum(logp[len(ids) - 1 + n, t] for n, t in enumerate(target)).exp())


@pytest.mark.parametrize("family", FAMILIES)
def test_says_it_and_finds_it_likely(family: str) -> None:
    model = tiny_model(family)
    prompts = ["w5 {} w9 w10", "{} w9", "w6 w8 w15 {}"]
    answers = [greedy(model, model.tokenizer(p.replace("{}", "w3 w7")).input_ids, 7) for p in prompts]
    for least in (0.0, 0.05, 1.1):
        facts = [
            ke.Fact(prompts[0], "w3 w7", f"w{answers[0][0]}"),
            ke.Fact(prompts[1], "w3 w7", "w59 w58 w57"),
            ke.Fact(prompts[2], "w3 w7", "W" + model.tokenizer.decode(answers[2][:2])[1:]),  # in capitals
        ]
        for fact, own, got in zip(facts, answers, known_facts(model, facts, 7, least), strict=True):
            assert got.said == model.tokenizer.decode(own, skip_special_tokens=True)
            ids, target = (model.tokenizer(t).input_ids for t in (fact.text, fact.target))
            assert got.probability == pytest.approx(probability(model, ids, target), rel=1e-3)
            assert got.known == (fact.target.strip().lower() in got.said.lower() and got.probability >= least)
            assert ke.known_fact(model, fact, 7, least).known == got.known


def test_positions_end_and_targets_are_needed() -> None:
    model = tiny_model("gpt2")
    fact = ke.Fact("{} " + " ".join(["w9"] * 60), "w3", "w4")
    assert len(model.tokenizer(ke.known_fact(model, fact).said).input_ids) <= 3
    with pytest.raises(ValueError, match="has no target"):
        ke.known_fact(model, ke.Fact("{} w9", "w3"))
