"""Evaluation under a noised subject, against the model run whole with a hook on its embeddings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import knowedit_ext as ke

from ..editing.models import fresh
from ..editing.plain import moments_of, noised
from ..support.families import FAMILIES, tiny_model

RECORD = {
    "case_id": 4,
    "requested_rewrite": {
        "prompt": "w5 {} w9 w10",
        "subject": "w3 w7",
        "target_new": {"str": "w20 w23"},
        "target_true": {"str": "w50"},
    },
    "paraphrase_prompts": ["w8 w9 w3 w7", "w11 w12 w13"],
    "neighborhood_prompts": ["w10 w9 w8", "w3 w7 w2 w4 w5", "w30 w31"],
}
TARGETS = {"target_new": [20, 23], "target_true": [50]}
SORTS = {"rewrite_prompts": ["w5 w3 w7 w9 w10"]} | {
    s: RECORD[s] for s in ("paraphrase_prompts", "neighborhood_prompts")
}
NOISE = ke.SubjectNoise(0.7, samples=3, seed=6)


def tokens(prompt: str) -> list[int]:
    return [int(word[1:]) for word in prompt.split()]


def subject_of(ids: list[int]) -> range:
    """The tokens of "w3 w7", which may be none."""
    at = next((n for n in range(len(ids)) if ids[n : n + 2] == [3, 7]), None)
    return range(0) if at is None else range(at, at + 2)


@torch.no_grad()
def likelihood(model: ke.EditableModel, ids: list[int], target: list[int], where: range, noise) -> float:
    with noised(model, [(where, noise)]):
        logp = model.hf(torch.tensor([ids + target[:-1]]), use_cache=False).logits[0].log_softmax(-1)
    return float(sum(logp[len(ids) - 1 + n, token] for n, token in enumerate(target)).exp())


def expected(model: ke.EditableModel, noise: ke.SubjectNoise) -> dict[str, list[dict[str, float]]]:
    """Mean NLL a token of the mean probability over draws, of each target behind each prompt."""
    drawn = noise.level * torch.from_numpy(np.random.RandomState(noise.seed).randn(noise.samples, 2, model.hidden_size))
    scores = {}
    for sort, prompts in SORTS.items():
        scores[f"{sort}_probs"] = rows = []
        for ids in map(tokens, prompts):
            where = subject_of(ids)
            draws = drawn if where else [None]
            p = {n: np.mean([likelihood(model, ids, t, where, draw) for draw in draws]) for n, t in TARGETS.items()}
            rows.append({name: -np.log(p[name]) / len(TARGETS[name]) for name in p})
    return scores


def agrees(got: dict, want: dict) -> None:
    for sort, rows in want.items():
        assert len(got[sort]) == len(rows)
        for row, other in zip(got[sort], rows, strict=True):
            assert row == {name: pytest.approx(value, rel=2e-4, abs=1e-5) for name, value in other.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_prompt_with_the_subject(family: str) -> None:
    model = tiny_model(family)
    report = ke.evaluate(model, [RECORD], generation=False, noise=NOISE)
    agrees(report.cases[0]["pre"], expected(model, NOISE))


def test_before_and_after_edits_of_their_own_under_the_noise_of_their_requests() -> None:
    model = fresh("gpt2")
    asked = replace(ke.EditRequest.of(RECORD), noise=NOISE)
    other = {**RECORD, "case_id": 5, "requested_rewrite": {**RECORD["requested_rewrite"], "prompt": "w6 {} w9"}}
    params = ke.ROMEParams(layers=(1,), v_num_grad_steps=3)
    edits = ke.rome_each(model, [asked, other], params, moments_of(model, (1,)), contexts=["{}"])
    noisy, clean = ke.evaluate(model, [RECORD, other], edits, generation=False).cases
    agrees(noisy["pre"], expected(model, NOISE))
    with edits[0].applied(model):
        agrees(noisy["post"], expected(model, NOISE))
    (plain,) = ke.evaluate(model, [other], [edits[1]], generation=False).cases
    agrees(clean["pre"], {f"{sort}_probs": plain["pre"][f"{sort}_probs"] for sort in SORTS})
    given = ke.evaluate(model, [RECORD], edits[0], generation=False, noise=ke.SubjectNoise(0.0)).cases[0]
    agrees(given["pre"], expected(model, ke.SubjectNoise(0.0)))  # what is given goes first


def test_as_released_rows_are_noised_as_prompts_of_their_number() -> None:
    """Row i is prompt i // 2 with target i % 2; it gets prompt i's place and a draw of its own."""
    model, noise = tiny_model("gpt2"), ke.SubjectNoise(0.7, seed=1)
    got = ke.evaluate(model, [RECORD], generation=False, noise=noise, compat="hase").cases[0]["pre"]
    prompts = [tokens(prompt) for each in SORTS.values() for prompt in each]
    drawn = 0.7 * torch.from_numpy(np.random.RandomState(1).randn(2 * len(prompts), 2, model.hidden_size))
    rows = iter([row for sort in SORTS for row in got[f"{sort}_probs"]])
    changed = 0
    for number, ids in enumerate(prompts):
        row = next(rows)
        for k, (name, target) in enumerate(TARGETS.items()):
            at = 2 * number + k
            where = subject_of(prompts[at]) if at < len(prompts) else range(0)
            where = range(where.start, min(where.stop, len(ids) + len(target) - 1))
            noise_here = drawn[at][: len(where)] if len(where) else None
            p = likelihood(model, ids, target, where, noise_here)
            changed += bool(len(where)) and at != 2 * number
            assert np.exp(-row[name] * len(target)) == pytest.approx(p, rel=2e-4)
    assert changed >= 1  # a row under another prompt's noise


def test_folders_know_their_noise(tmp_path) -> None:
    model = tiny_model("gpt2")
    ke.evaluate(model, [RECORD], generation=False, noise=0.5, out=tmp_path)
    again = ke.evaluate(model, [RECORD], generation=False, noise=0.5, out=tmp_path)
    assert len(again.cases) == 1
    for other in (None, 0.4, ke.SubjectNoise(0.5, samples=2)):
        with pytest.raises(ValueError, match="noise"):
            ke.evaluate(model, [RECORD], generation=False, noise=other, out=tmp_path)
