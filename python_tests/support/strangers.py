"""Tiny models of families that the package does not know, added by one line as a user would."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import knowedit_ext as ke
from knowedit_ext.model.families import FAMILIES

from .families import _PLAIN, VOCAB, spread_weights
from .tokenizers import word_level


def stranger(
    kind: str, monkeypatch: pytest.MonkeyPatch, down_projection: str = "mlp.down_proj", **config
) -> ke.EditableModel:
    line = dataclasses.replace(FAMILIES["llama"], down_projection=down_projection)
    monkeypatch.setitem(FAMILIES, kind, line)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(_PLAIN | config)), dtype=torch.float32)
    return ke.load_model((spread_weights(hf.eval()), word_level(VOCAB)))


def gpt_oss(monkeypatch: pytest.MonkeyPatch) -> ke.EditableModel:
    """Attention sinks: a row's weights add up to less than 1."""
    experts = dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=64)
    model = stranger("gpt_oss", monkeypatch, "mlp", **experts)
    for layer in model.modules.layers:
        torch.nn.init.ones_(layer.self_attn.sinks)
    return model
