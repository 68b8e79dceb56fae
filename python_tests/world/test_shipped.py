"""The shipped checkpoint is a fair test bed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from knowedit_ext.world import load_world
from knowedit_ext.world.measure import answer_probabilities, indirect_effects, subject_noise, subject_tokens

WORLD = load_world()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(WORLD.folder).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORLD.folder)


def test_it_is_small_and_a_plain_gpt2(model) -> None:
    assert sum(f.stat().st_size for f in WORLD.folder.iterdir()) <= 10_000_000
    assert type(model).__name__ == "GPT2LMHeadModel" and model.dtype == torch.float32
    assert model.config.n_positions == 128 and model.config.activation_function == "gelu_new"
    with safe_open(WORLD.folder / "model.safetensors", "pt") as file:
        assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("prefix", [False, True])
def test_it_knows_statements_it_never_saw(model, tokenizer, prefix: bool) -> None:
    right, probability = answer_probabilities(model, tokenizer, WORLD.held_out(prefix))
    assert right.mean() >= 0.99 and probability.mean() > 0.95


def test_it_goes_on_with_the_whole_object_and_a_full_stop(model, tokenizer) -> None:
    for fact in [f for f in WORLD.facts() if " " in f["attribute"]][:3] + WORLD.facts()[:3]:
        ids = tokenizer(fact["prompt"], return_tensors="pt").input_ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(out[0, ids.shape[1] :]).startswith(fact["prediction"])


def test_facts_are_enriched_at_the_last_subject_token(model, tokenizer) -> None:
    noise = subject_noise(model, tokenizer, [p.name for p in WORLD.people])
    effects, clean, corrupted = indirect_effects(model, tokenizer, WORLD.facts()[:8], noise)
    subject, last = effects["last subject"], effects["last"]
    assert clean > 0.95 and clean - corrupted > 0.5
    assert subject[:2].min() > 0.5 and subject[-1] < 0.1  # the early site
    assert last[-2:].min() > 0.6 and last[0] < 0.3  # the late site
    assert np.max(effects["first subject"]) < 0.3


def test_subject_tokens_and_their_error(tokenizer) -> None:
    name = WORLD.people[0].name
    prompt = f"The sport of {name} is"
    first, end = subject_tokens(tokenizer, prompt, name)
    assert tokenizer.decode(tokenizer(prompt).input_ids[first:end]) == " " + name
    with pytest.raises(ValueError, match="does not occur"):
        subject_tokens(tokenizer, prompt, "Nobody Inparticular")
