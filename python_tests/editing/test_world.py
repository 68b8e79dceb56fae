"""The quality of edits in the built-in world, measured as CounterFact does: is the new target likelier than the true?

Efficacy on the edited prompt, paraphrase on templates never seen for the fact, neighbourhood on other people with the
same true object. A target's probability is exp of the mean log-probability of its tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.methods.memit import MEMITParams, memit
from knowedit_ext.editing.methods.rome import ROMEParams, rome
from knowedit_ext.moments import Moments, collect_moments
from knowedit_ext.world import World, load_world

from ..support.unchanged import assert_unchanged, snapshot

pytestmark = pytest.mark.slow  # 40 s
KEYS = 20 * 640  # second moments over so many keys: 20 for each of their dimensions


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


@pytest.fixture(scope="module")
def model(world: World) -> ke.EditableModel:
    return ke.load_model(world.folder)


@pytest.fixture(scope="module")
def moments(world: World, model: ke.EditableModel) -> Moments:
    facts = world.facts() + world.held_out(prefix=True)
    texts = [f"{fact['prompt']} {fact['attribute']}." for fact in facts]
    random.Random(0).shuffle(texts)
    return collect_moments(model, texts, layers=(1, 2, 3), max_tokens=KEYS)


@torch.no_grad()
def log_probabilities(model: ke.EditableModel, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
    """[pairs] mean log-probability of the tokens of " target" behind a prompt."""
    encoded = [(model.tokenizer(prompt).input_ids, model.tokenizer(" " + target).input_ids) for prompt, target in pairs]
    means = torch.empty(len(pairs))
    order = sorted(range(len(pairs)), key=lambda n: sum(map(len, encoded[n])))
    for numbers in (order[i : i + 256] for i in range(0, len(order), 256)):
        longest = sum(map(len, encoded[numbers[-1]]))
        rows = [[*prompt, *target] for prompt, target in (encoded[n] for n in numbers)]
        logits = model.hf(torch.tensor([row + [0] * (longest - len(row)) for row in rows])).logits
        for row, n in zip(logits, numbers, strict=True):
            prompt, target = encoded[n]
            at = slice(len(prompt) - 1, len(prompt) - 1 + len(target))
            means[n] = row[at].log_softmax(-1).gather(1, torch.tensor(target)[:, None]).mean()
    return means


def scores(model: ke.EditableModel, records: Sequence[dict]) -> dict[str, float]:
    """Mean over records of the share of a record's prompts on which the wanted target is likelier."""
    shares = {}
    for name, key in (
        ("efficacy", None),
        ("paraphrase", "paraphrase_prompts"),
        ("neighbourhood", "neighborhood_prompts"),
    ):
        pairs: dict[str, list[tuple[str, str]]] = {"target_new": [], "target_true": []}
        counts = []
        for record in records:
            rewrite = record["requested_rewrite"]
            prompts = record[key] if key else [rewrite["prompt"].format(rewrite["subject"])]
            counts.append(len(prompts))
            for which, asked in pairs.items():
                asked += [(prompt, rewrite[which]["str"]) for prompt in prompts]
        new, true = (log_probabilities(model, which) for which in pairs.values())
        right = (true > new if name == "neighbourhood" else new > true).float()
        shares[name] = float(torch.stack([part.mean() for part in right.split(counts)]).mean())
    return shares


def good(after: dict[str, float], before: dict[str, float]) -> None:
    assert before["efficacy"] < 0.02 and before["paraphrase"] < 0.02 and before["neighbourhood"] > 0.98
    assert after["efficacy"] >= 0.98
    assert after["paraphrase"] >= 0.90
    assert after["neighbourhood"] >= before["neighbourhood"] - 0.05


def test_rome_one_at_a_time(world: World, model: ke.EditableModel, moments: Moments) -> None:
    records, before = world.records()[:10], snapshot(model.hf)
    every = []
    for record in records:
        edit = rome(model, record, ROMEParams.preset("world"), moments)
        with edit.applied(model):
            every.append(scores(model, [record]))
    assert_unchanged(before, model.hf)
    good({name: sum(shares[name] for shares in every) / len(every) for name in every[0]}, scores(model, records))


@pytest.mark.parametrize("first", [0, 100])
def test_memit_of_a_hundred(world: World, model: ke.EditableModel, moments: Moments, first: int) -> None:
    """Of different people: facts of one person share the key at the name, where MEMIT can put but one value."""
    records, before = world.records()[first : first + 100], snapshot(model.hf)
    assert len({record["requested_rewrite"]["subject"] for record in records}) == 100
    edit = memit(model, records, MEMITParams.preset("world"), moments)
    with edit.applied(model):
        after = scores(model, records)
    assert_unchanged(before, model.hf)
    good(after, scores(model, records))
