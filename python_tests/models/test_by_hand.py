"""What a newcomer's line gives for a model that is not in the list: right, or refused with a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import CONFIG_MAPPING

from ..support.by_hand import guessed, tiny, verdict

pytestmark = pytest.mark.filterwarnings("ignore")

# Choices of keys, states of several streams, states that layers hand each other, hybrids.
TYPES = (
    "deepseek_v32@0 deepseek_v32@1 deepseek_v32@2 axk2@0 glm_moe_dsa@0 minimax_m3_vl_text@0 deepseek_v4@0 "
    "gemma3n_text@0 nemotron_h@0 inkling_text@0 inkling2_text@0 bert@0"
).split()


@pytest.mark.parametrize("whole", [False, True], ids=["tree", "whole"])
@pytest.mark.parametrize("name", TYPES)
def test_nothing_is_silently_wrong(name: str, whole: bool) -> None:
    model_type, _, seed = name.partition("@")
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such model")
    hf = tiny(model_type, int(seed))
    found = verdict(hf, replace(guessed(hf), whole=whole))
    assert found.said in ("right", "refused"), found
