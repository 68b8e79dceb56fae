"""What inputs are made from: two tiny models, and a sound input of every kind."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from support.families import tiny_hf
from support.tokenizers import SENTENCES, tokenizer
from support.unchanged import assert_unchanged, snapshot
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import knowedit_ext as ke
from knowedit_ext.editing.methods import METHODS

LAYERS = (1, 2)
TEXTS = SENTENCES * 2 + [f"The mayor of {name} lives in {name}" for name in "Miles Japan Ghana Alton Seattle".split()]
FACT = dict(prompt="{} plays the", subject="Miles Davis", target=" trumpet")
REQUEST = dict(prompt="{} plays the", subject="Miles Davis", target_new="violin", target_true="trumpet", case_id=3)
KNOWN = [
    dict(known_id=1, prompt="Miles Davis plays the", subject="Miles Davis", attribute="trumpet", prediction=" trumpet"),
    dict(known_id=7, prompt="The capital of Japan is", subject="Japan", attribute="Tokyo", relation_id="P36"),
]
RECORDS: list[dict[str, Any]] = [
    dict(
        case_id=0,
        requested_rewrite=dict(
            prompt="{} plays the",
            relation_id="P1303",
            subject="Miles Davis",
            target_new=dict(str="violin", id="Q1"),
            target_true=dict(str="trumpet", id="Q2"),
        ),
        paraphrase_prompts=["Miles Davis performs on the", "The mayor lives. Miles Davis plays the"],
        neighborhood_prompts=["Niccolo Paganini plays the"],
        attribute_prompts=["Miles plays the"],
        generation_prompts=["Miles Davis"],
    ),
    dict(
        case_id=5,
        requested_rewrite=dict(
            prompt="The capital of {} is",
            relation_id="P36",
            subject="Japan",
            target_new=dict(str="Alton", id="Q3"),
            target_true=dict(str="Seattle", id="Q4"),
        ),
        paraphrase_prompts=["Japan has the capital"],
        neighborhood_prompts=["The capital of Ghana is"],
        attribute_prompts=[],
        generation_prompts=[],
    ),
]
FLAT = [
    dict(
        case_id=0,
        prompt="Miles Davis plays the",
        subject="Miles Davis",
        target_new="violin",
        ground_truth="trumpet",
        rephrase_prompt="Miles Davis performs on the",
        locality_prompt="Niccolo Paganini plays the",
        locality_ground_truth="violin",
    )
]
ZSRE = [
    dict(
        subject="Miles Davis",
        src="What does Miles Davis play?",
        rephrase="Which instrument is Miles Davis's?",
        answers=["trumpet"],
        alt="violin",
        loc="nq question: who is the mayor",
        loc_ans="Miles",
        portability={"New Question": "Who invented the violin?", "New Answer": "Niccolo"},
    )
]
KNOWEDIT = [
    dict(
        subject="Miles Davis",
        prompt="Miles Davis plays the",
        target_new="violin",
        ground_truth=["trumpet"],
        portability={"Subject_Aliasing": [{"prompt": "Miles plays the", "ground_truth": "violin"}]},
        locality={"Relation_Specificity": [{"prompt": "Miles was born in", "ground_truth": ["Alton"]}]},
    )
]
MQUAKE = [
    dict(
        case_id=1,
        requested_rewrite=[dict(RECORDS[0]["requested_rewrite"], question="What does Miles Davis play?")],
        questions=["What is the instrument of Miles Davis made of?"],
        answer="brass",
        new_answer="wood",
    )
]
SNIPPETS = [
    dict(relation_id="P1303", target_id="Q1", samples=[dict(name="Niccolo", text="Niccolo Paganini plays the violin")]),
    dict(relation_id="P36", target_id="Q3", samples=[dict(name="Alton", text="Miles was born in Alton")]),
]
# Cheap settings, of the parameters that a method has.
_CHEAP = dict(
    layers=[1],
    v_num_grad_steps=2,
    num_steps=2,
    clamp_norm_factor=4.0,
    context_template_length_params=[[2, 1]],
    nullspace_threshold=1.0,
)
SINGLE = tuple(name for name, method in METHODS.items() if method.single)


def params(method: str) -> dict[str, Any]:
    """Sound parameters of any method of the table, as its published file has them."""
    row = METHODS[method]
    given = json.loads(json.dumps(row.params_of(row.presets[0]).to_dict()))
    return given | {name: value for name, value in _CHEAP.items() if name in given}


def options(method: str) -> dict[str, Any]:
    """What the method wants beside its parameters."""
    given = dict(moments=moments, contexts=lambda: ["{}"] if method in SINGLE else [["{}"]])
    return {name: make() for name, make in given.items() if METHODS[method].takes(name)}


@cache
def edit(method: str) -> ke.Edit:
    return ke.edit(model(), [REQUEST], method, params=params(method), **options(method))


def model(family: str = "gpt2") -> ke.EditableModel:
    """Of all inputs; they leave it as it is."""
    return _model(family)


@cache
def _model(family: str) -> ke.EditableModel:
    return ke.load_model(_parts(family))


def _parts(family: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    words = tokenizer("byte_bpe" if family == "gpt2" else "byte_bpe_bos")
    return tiny_hf(family, vocab_size=len(words)), words


@cache
def _before(family: str) -> dict:
    return snapshot(model(family).hf)


def watch() -> None:
    """Remember every model as it is now."""
    for family in ("gpt2", "llama"):
        _before(family)


def check_models() -> None:
    """AssertionError where a model is not as it was; the next input gets a new one."""
    try:
        for family in ("gpt2", "llama"):
            assert_unchanged(_before(family), model(family).hf)
            assert not model(family).__dict__.get("applied_edits"), "an edit stayed applied"
    except AssertionError:
        forget()
        raise


def forget() -> None:
    for made in (_model, _before, moments, edit, trace):
        made.cache_clear()


@cache
def moments() -> ke.Moments:
    """Of random keys: more of them than they are wide, so that they are positive definite."""
    drawn = torch.Generator().manual_seed(0)
    arrays = {}
    for layer in LAYERS:
        keys = torch.randn(400, 128, generator=drawn, dtype=torch.float64)
        arrays[layer] = (keys.T @ keys / len(keys), len(keys))
    return ke.Moments.from_arrays(arrays)


@cache
def trace() -> ke.Trace:
    return ke.trace(model(), ke.Fact(**FACT), samples=2, window=2)


def saved_model(folder: Path) -> Path:
    """The first model as a folder that `load_model` reads."""
    path = folder / "model"
    if not path.exists():
        for part in _parts("gpt2"):  # not of the model itself: saving changes its configuration
            part.save_pretrained(path)
    return path


def deltas(edit: ke.Edit) -> dict[str, torch.Tensor]:
    return {name: edit.delta(name) for name in edit.changes}


def same_edit(one: ke.Edit, other: ke.Edit) -> bool:
    here, there = deltas(one), deltas(other)
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
