"""Generation and essence under many edits at once give what each edit gives when applied alone."""

from __future__ import annotations

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.edit import Edit, LowRank, weight_is_input_first
from knowedit_ext.editing.rows import EditedRows
from knowedit_ext.evaluation.generation import generate, record_seed
from knowedit_ext.evaluation.metrics.essence import perplexity

from ..support.families import tiny_model
from ..support.unchanged import assert_unchanged, snapshot

PROMPTS = ["w3 w9 w11", "w5", "w20 w21 w22 w23 w24 w7", "w9 w9", "w4 w30 w31 w32"]
INDEX = [1, 0, -1, 2, 0]
SEEDS = [record_seed("own", number) for number in range(len(PROMPTS))]


def random_edits(model: ke.EditableModel, count: int) -> list[Edit]:
    """Of two layers, and of ranks 1, 2, ..."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for rank in range(1, count + 1):
        changes = {}
        for layer in (1, 2):
            module = model.modules.down_projection(layer)
            first = weight_is_input_first(module)
            d_in, d_out = module.weight.shape if first else module.weight.shape[::-1]
            factors = (torch.randn(d, rank, generator=generator) * d**-0.25 for d in (d_in, d_out))
            changes[model.modules.parameter_name(layer) + ".weight"] = LowRank(*factors, first)
        made.append(Edit(changes))
    return made


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "gemma2"])
def test_as_when_applied_alone(family: str) -> None:
    model = tiny_model(family)
    edits = random_edits(model, 3)
    rows, before = EditedRows(model, edits), snapshot(model.hf)
    texts = generate(model, PROMPTS, SEEDS, max_length=16, batch=3, edits=rows, index=INDEX)
    scores = perplexity(model, PROMPTS[2:], edits=rows, index=INDEX[2:], max_length=20)
    assert_unchanged(before, model.hf)
    assert sum(a != b for a, b in zip(texts, generate(model, PROMPTS, SEEDS, max_length=16), strict=True)) >= 3
    for place, number in enumerate(INDEX):
        alone = edits[number] if number >= 0 else Edit({})
        with alone.applied(model):
            assert generate(model, [PROMPTS[place]], [SEEDS[place]], max_length=16) == [texts[place]]
            if place >= 2:
                assert perplexity(model, [PROMPTS[place]], max_length=20) == pytest.approx([scores[place - 2]], 1e-4)
