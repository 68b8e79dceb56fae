"""Scores of continuations against plain forward passes, one text at a time."""

from __future__ import annotations

import random

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.edit import LowRank, weight_is_input_first
from knowedit_ext.evaluation.edited import Edited
from knowedit_ext.evaluation.nll import Question, score, tokenize_question

from ..support.families import FAMILIES, LAYERS, tiny_hf, tiny_model
from ..support.tokenizers import byte_bpe
from ..support.unchanged import assert_unchanged, snapshot


def words(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.randrange(2, 60)}" for _ in range(count))


def some_questions(count: int = 9, seed: int = 0, edits: int = 1) -> list[Question]:
    draw = random.Random(seed)
    asked = []
    for n in range(count):
        targets = tuple(" " + words(draw, length) for length in draw.sample((1, 1, 2, 4), draw.choice((1, 2, 3))))
        asked.append(Question(words(draw, draw.randint(1, 8)), targets, n % edits))
    return asked


@torch.no_grad()
def plain(model: ke.EditableModel, question: Question) -> list[tuple[float, tuple[bool, ...]]]:
    scores = []
    for target in question.targets:
        first = len(model.tokenizer(question.prompt).input_ids)
        ids = model.tokenizer(question.prompt + target).input_ids
        logits = model.hf(torch.tensor([ids]), use_cache=False).logits[0].double()
        logp = logits.log_softmax(-1)
        places = range(first, len(ids))
        nll = -sum(float(logp[t - 1, ids[t]]) for t in places) / len(places)
        scores.append((nll, tuple(int(logits[t - 1].argmax()) == ids[t] for t in places)))
    return scores


def assert_equal(model: ke.EditableModel, ours: list, questions: list[Question]) -> None:
    for scores, question in zip(ours, questions, strict=True):
        for got, (nll, right) in zip(scores, plain(model, question), strict=True):
            assert got.nll == pytest.approx(nll, abs=1e-5, rel=5e-6)  # float32 sums
            assert got.right == right and got.correct == all(right)


def random_edit(model: ke.EditableModel, layer: int, seed: int, rank: int = 2, size: float = 0.3) -> ke.Edit:
    draw = torch.Generator().manual_seed(seed)
    module = model.modules.down_projection(layer)
    first = weight_is_input_first(module)
    wide, out = module.weight.shape if first else module.weight.shape[::-1]
    change = LowRank(
        torch.randn(wide, rank, generator=draw) * size, torch.randn(out, rank, generator=draw) * size, first
    )
    return ke.Edit({f"{model.modules.parameter_name(layer)}.weight": change}, "random")


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_plain_forward_passes(family: str) -> None:
    model, questions = tiny_model(family), some_questions()
    before = snapshot(model.hf)
    scores, none = score(model, questions)
    assert none is None
    assert_equal(model, scores, questions)
    assert_unchanged(before, model.hf)


@pytest.mark.parametrize("family", FAMILIES)
def test_before_and_after_one_edit(family: str) -> None:
    model, questions = tiny_model(family), some_questions(seed=1)
    edit = random_edit(model, 2, 0)
    before = snapshot(model.hf)
    pre, post = score(model, questions, Edited(model, edit))
    assert_unchanged(before, model.hf)
    assert_equal(model, pre, questions)
    with edit.applied(model):
        assert_equal(model, post, questions)


@pytest.mark.parametrize("family", FAMILIES)
def test_many_edited_models_in_one_batch(family: str) -> None:
    model, questions = tiny_model(family), some_questions(12, seed=2, edits=4)
    edits = [random_edit(model, layer, n, rank) for n, (layer, rank) in enumerate([(1, 1), (3, 2), (1, 3), (2, 1)])]
    pre, post = score(model, questions, Edited(model, edits), max_rows=40)
    assert_equal(model, pre, questions)
    for n, edit in enumerate(edits):
        with edit.applied(model):
            mine = [k for k, question in enumerate(questions) if question.edit == n]
            assert_equal(model, [post[k] for k in mine], [questions[k] for k in mine])


def test_rows_held_at_once_change_nothing_but_rounding() -> None:
    model, questions = tiny_model("llama"), some_questions(20, seed=3)
    whole, _ = score(model, questions)
    for most in (1, 17, 50):
        parts, _ = score(model, questions, max_rows=most)
        for a, b in zip(whole, parts, strict=True):
            assert [x.nll for x in a] == pytest.approx([x.nll for x in b], abs=1e-5)


def test_without_the_baseline() -> None:
    model, questions = tiny_model("gpt2"), some_questions(3)
    edited = Edited(model, random_edit(model, 1, 0))
    pre, post = score(model, questions, edited, before=False)
    assert pre is None and post == score(model, questions, edited)[1]


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.ln_f.weight", "transformer.wpe.weight"])
def test_an_edit_outside_the_layers(name: str) -> None:
    model, questions = ke.load_model((tiny_hf("gpt2"), tiny_model("gpt2").tokenizer)), some_questions(4)
    change = 0.1 * torch.randn(model.hf.get_parameter(name).shape, generator=torch.Generator().manual_seed(0))
    edit = ke.Edit({name: change}, "dense")
    pre, post = score(model, questions, Edited(model, edit))
    assert_equal(model, pre, questions)
    with edit.applied(model):
        assert_equal(model, post, questions)


def test_the_first_layer_that_an_edit_changes() -> None:
    model = tiny_model("mistral")
    assert Edited(model, random_edit(model, 2, 0)).first_layer == 2
    assert Edited(model, [random_edit(model, 3, 0), random_edit(model, 1, 1)]).first_layer == 1
    head = ke.Edit({"lm_head.weight": torch.zeros_like(model.hf.lm_head.weight)}, "dense")
    tied = model.hf.lm_head.weight is model.hf.get_input_embeddings().weight
    assert Edited(model, head).first_layer == (0 if tied else LAYERS)


def test_the_model_is_itself_again_after_a_failure(monkeypatch) -> None:
    model, questions = tiny_model("gpt2"), some_questions(3)
    edited = Edited(model, random_edit(model, 1, 0))
    before = snapshot(model.hf)
    with pytest.raises(KeyboardInterrupt), edited.rows(torch.zeros(1, dtype=torch.long)):
        raise KeyboardInterrupt
    assert_unchanged(before, model.hf)
    assert_equal(model, score(model, questions)[0], questions)


def test_a_target_that_merges_with_its_prompt_is_scored_from_the_merged_token_on() -> None:
    tokenizer = byte_bpe()
    model = ke.load_model((tiny_hf("gpt2", vocab_size=len(tokenizer)), tokenizer))
    question = Question("Miles Davis plays the tr", ("umpet",))
    tokenized = tokenize_question(model, question)
    whole = tuple(tokenizer("Miles Davis plays the trumpet").input_ids)
    assert tokenized.joint[0] == whole and whole[: tokenized.shared[0]] == tokenized.ids[: tokenized.shared[0]]
    assert tokenized.shared[0] < len(tokenized.ids)
    [[got]], _ = score(model, [question])
    logp = model.hf(torch.tensor([whole])).logits[0].log_softmax(-1)
    places = range(tokenized.shared[0], len(whole))
    assert got.nll == pytest.approx(-sum(float(logp[t - 1, whole[t]]) for t in places) / len(places), abs=1e-5)


def test_targets_that_cannot_be_scored() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="gives no token of its own"):
        tokenize_question(model, Question("w3 w4", ("",)))
    with pytest.raises(ValueError, match="more than the model's 64 positions"):
        tokenize_question(model, Question("w3", (" w4" * 70,)))
