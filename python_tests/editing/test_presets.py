"""Presets of the closed-form methods beside the files that they are from: what those say of the edit itself."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import pytest

from knowedit_ext.editing.methods import METHODS

# What nearly all files say; and what says nothing of the edit, whichever file it is in.
COMMON = dict(
    layer_selection="all",
    fact_token="subject_last",
    v_lr=5e-1,
    v_weight_decay=0.5,
    kl_factor=0.0625,
    clamp_norm_factor=0.75,
    mom2_adjustment=True,
    mom2_dataset="wikipedia",
    mom2_n_samples=100000,
    mom2_dtype="float32",
    rewrite_module_tmp="model.layers.{}.mlp.down_proj",
    layer_module_tmp="model.layers.{}",
    mlp_module_tmp="model.layers.{}.mlp",
    attn_module_tmp="model.layers.{}.self_attn",
    ln_f_module="model.norm",
    lm_head_module="lm_head",
)
YAML = dict(stats_dir="./data/stats", device=0)
STARTS = dict(layers=[4, 5, 6, 7, 8], v_num_grad_steps=25, mom2_update_weight=15000)
EASY = dict(v_lr="5e-1", v_weight_decay="1e-3", clamp_norm_factor=4)
XL = dict(layers=[13, 14, 15, 16, 17], v_num_grad_steps=20)
J = dict(layers=[3, 4, 5, 6, 7, 8], v_num_grad_steps=25)
ONE = dict(layers=[5], v_num_grad_steps=25)
ALPHA = dict(nullspace_threshold=2e-2, L2=10)
EMMET = dict(update_norm_lambda=0, emmet_lambda=0.1)
ENCORE = EMMET | dict(calculate_objective_value=False, add_prev_edits=True, norm_control=0)
PMET = dict(nll_loss_factor=1, rewrite_module_tmps=["model.layers.{}.mlp.down_proj"])

FILES: dict[tuple[str, str], dict[str, Any]] = {
    # AlphaEdit f5248d3, hparams/AlphaEdit/*.json
    ("alphaedit", "gpt2-xl"): XL | ALPHA | dict(mom2_update_weight=20000),
    ("alphaedit", "gpt-j"): J | ALPHA | dict(mom2_update_weight=15000),
    ("alphaedit", "llama-3-8b"): STARTS | ALPHA | dict(v_lr=1e-1),
    # EasyEdit 14cea82, hparams/AlphaEdit/*.yaml
    ("alphaedit", "llama-3.1-8b"): STARTS | ALPHA | YAML | dict(v_lr="1e-1", P_loc="./null_space_project.pt"),
    ("alphaedit", "qwen2.5-7b"): STARTS | ALPHA | YAML | EASY | dict(L2=1, P_loc="./null_space_project.pt"),
    # unified-model-editing 23d72b5, hparams/EMMET/*.json
    ("emmet", "gpt2-xl"): EMMET | dict(layers=[17], v_num_grad_steps=20, mom2_update_weight=1000),
    ("emmet", "gpt-j"): EMMET | ONE | dict(mom2_update_weight=1),
    ("emmet", "llama-2-7b"): EMMET | ONE | EASY | dict(mom2_update_weight=1),
    # encore b87d96d, hparams/EMMET/llama3-8b.json
    ("emmet", "llama-3-8b"): EMMET | ONE | dict(mom2_update_weight=100000, calculate_objective_value=False),
    # EasyEdit, hparams/EMMET/*.yaml
    ("emmet", "llama-3.2-3b"): EMMET | ONE | EASY | YAML | dict(mom2_update_weight=100000),
    ("emmet", "gpt2-xl/easyedit"): EMMET | XL | YAML | dict(mom2_update_weight=1),
    ("emmet", "gpt-j/easyedit"): EMMET | J | YAML | dict(mom2_update_weight=1),
    ("emmet", "llama-2-7b/easyedit"): EMMET | STARTS | EASY | YAML | dict(mom2_update_weight=1),
    # encore, hparams/ENCORE/*.json
    ("encore", "gpt2-xl"): ENCORE | XL | dict(mom2_update_weight=20000, update_norm_lambda=10, prob_cutoff=-4),
    ("encore", "llama-2-7b"): ENCORE | STARTS | dict(update_norm_lambda=10, prob_cutoff=-3),
    ("encore", "llama-3-8b"): ENCORE | STARTS | dict(update_norm_lambda=20, prob_cutoff=-2),
    # EasyEdit, hparams/MEMIT/*.yaml
    ("memit", "llama-2-7b"): STARTS | EASY | YAML,
    ("memit", "llama-3.2-3b"): STARTS | EASY | YAML,
    ("memit", "mistral-7b"): STARTS | EASY | YAML,
    ("memit", "qwen2-7b"): STARTS | EASY | YAML,
    ("memit", "qwen2.5-7b"): STARTS | EASY | YAML,
    # EasyEdit, hparams/PMET/*.yaml
    ("pmet", "gpt-j/easyedit"): PMET
    | YAML
    | J
    | dict(v_num_grad_steps=30, v_lr=2e-1, kl_factor=1, mom2_update_weight=15000),
    ("pmet", "llama-2-7b"): PMET | YAML | STARTS | dict(v_num_grad_steps=20, clamp_norm_factor=1),
    ("pmet", "llama-3.2-3b"): PMET | YAML | STARTS | dict(clamp_norm_factor=1),
}


@pytest.mark.parametrize("name, preset", FILES)
def test_presets_are_the_published_files(name: str, preset: str) -> None:
    method = METHODS[name]
    file = COMMON | FILES[name, preset] | {"alg_name": method.params.algorithms[0]}
    published = asdict(method.params_of(file))
    ours = asdict(method.params_of(preset))
    if name == "alphaedit":  # which the method has no use for
        published["mom2_update_weight"] = ours["mom2_update_weight"]
    assert ours == published


ULTRAEDIT = {
    "gpt-j": [f"transformer.h.{n}.mlp.fc_out" for n in range(18, 27)],
    "mistral-7b": [f"model.layers.{n}.mlp.down_proj" for n in (29, 30)],
    "phi-4": [f"model.layers.{n}.mlp.down_proj" for n in range(30, 39)],
    "llama-3-8b": [f"model.layers.{n}.mlp.gate_proj" for n in range(11, 16)]
    + [f"model.layers.{n}.mlp.up_proj" for n in range(18, 25)],
    "qwen2.5-7b": [f"model.layers.{n}.mlp.{kind}" for kind in ("gate_proj", "up_proj") for n in range(18, 27)],
    "gemma-3-27b": [
        f"model.language_model.layers.{n}.mlp.{kind}" for kind in ("gate_proj", "up_proj") for n in range(52, 61)
    ],
}


@pytest.mark.parametrize("name", ULTRAEDIT)
def test_ultraedits_modules(name: str) -> None:
    """EasyEdit, hparams/UltraEdit/*.yaml; down projections are told by their layers."""
    params = METHODS["ultraedit"].params_of(name)
    if params.inner_params:
        assert list(params.inner_params) == ULTRAEDIT[name]
    else:
        assert list(params.layers) == [int(re.search(r"\d+", module)[0]) for module in ULTRAEDIT[name]]
    assert params.lr == 1e-6


def test_every_preset_of_these_methods_is_from_a_file() -> None:
    elsewhere = {"world", "smollm2-135m", "gemma-3-270m"}  # ours
    elsewhere |= {"gpt-j", "gpt-neox", "gpt2-xl", "llama-3-8b"}  # see test_params; PMET's own repository
    for name in ("alphaedit", "emmet", "encore", "memit", "pmet"):
        assert {preset for preset in METHODS[name].presets if (name, preset) not in FILES} <= elsewhere
    assert set(METHODS["ultraedit"].presets) == {*ULTRAEDIT, "world"}
