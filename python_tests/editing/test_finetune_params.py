"""Parameters of fine-tuning: published files, presets, and what makes no sense."""

from __future__ import annotations

import json

import pytest

from knowedit_ext.editing.methods.finetune import FTParams

# hparams/FT/*.json of rome and memit.
GPT2 = {
    "layers": [1],
    "num_steps": 25,
    "lr": 5e-4,
    "weight_decay": 0,
    "kl_factor": 0,
    "norm_constraint": False,
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "transformer.wte",
}
GPTJ = GPT2 | {"rewrite_module_tmp": "transformer.h.{}.mlp.fc_out", "lm_head_module": "lm_head"}
POWER_LAW = [-0.87028798, 0.15589562]
FILES = {
    "gpt2-medium/ft-l": GPT2 | {"layers": [0], "norm_constraint": 2e-3},
    "gpt2-large/ft-l": GPT2 | {"layers": [0], "norm_constraint": 1e-3},
    "gpt2-xl": GPT2,
    "gpt2-xl/ft-l": GPT2 | {"layers": [0], "norm_constraint": 5e-4},
    "gpt2-xl/attn": GPT2
    | {"layers": [33], "lr": 1e-3, "norm_constraint": 1e-3, "rewrite_module_tmp": "transformer.h.{}.attn.c_attn"},
    "gpt-j": GPTJ | {"layers": [21]},
    "gpt-j/ft-l": GPTJ | {"layers": [0], "norm_constraint": 5e-5},
    "gpt-j/ft-w": GPTJ
    | {"layers": [21], "weight_decay": False, "wd_power_law": POWER_LAW, "rewrite_module_tmp": "transformer.h.{}"},
}


@pytest.mark.parametrize("name", FILES)
def test_presets_are_the_published_files(name: str) -> None:
    published, preset = FTParams.from_dict(FILES[name]), FTParams.preset(name)
    for field in ("layers", "num_steps", "lr", "weight_decay", "norm_constraint", "batch_size", "wd_power_law"):
        assert getattr(preset, field) == getattr(published, field), field
    assert published.rewrite_module_tmp == FILES[name]["rewrite_module_tmp"]
    if preset.rewrite_module_tmp is None:  # the down projection
        assert published.rewrite_module_tmp in (GPT2["rewrite_module_tmp"], GPTJ["rewrite_module_tmp"])
    else:
        assert preset.rewrite_module_tmp == published.rewrite_module_tmp


def test_every_preset_is_known() -> None:
    assert set(FTParams.presets) == {*FILES, "world", "world/ft-l"}
    with pytest.raises(ValueError, match="no FTParams preset 'gpt2': there are .*gpt2-xl/ft-l"):
        FTParams.preset("gpt2")


@pytest.mark.parametrize("name", FTParams.presets)
def test_there_and_back(name: str, tmp_path) -> None:
    params, file = FTParams.preset(name), tmp_path / "params.json"
    file.write_text(json.dumps(params.to_dict()))
    assert FTParams.from_json(file) == params and hash(FTParams.from_json(file)) == hash(params)


def test_keys_of_other_files() -> None:
    assert FTParams.from_dict(GPT2 | {"max_length": 40, "batch_size": 1}).batch_size == 1
    assert FTParams.from_dict({"layers": [0]}) == FTParams(layers=(0,))
    assert FTParams.from_dict(FILES["gpt-j/ft-w"]).weight_decay == 0.0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=3), "FTParams: unknown keys steps; known: .*norm_constraint"),
        (dict(layers=[]), "layers is empty"),
        (dict(layers=[3, 1]), r"layers \[3, 1\]: expected different layers in ascending order"),
        (dict(num_steps=0), "num_steps is 0: expected at least 1"),
        (dict(batch_size=0), "batch_size is 0: expected at least 1"),
        (dict(lr=0), "lr is 0: expected a number above 0"),
        (dict(lr=float("nan")), "lr is nan: expected a number, and a finite one"),
        (dict(norm_constraint=0), "norm_constraint is 0: expected a number above 0"),
        (dict(norm_constraint=-1e-3), "norm_constraint is -0.001"),
        (dict(norm_constraint=float("nan")), "norm_constraint is nan"),
        (dict(weight_decay=-1), "weight_decay is -1: expected at least 0"),
        (dict(weight_decay=float("nan")), "weight_decay is nan"),
        (dict(wd_power_law=[1.0]), r"wd_power_law is \[1.0\]: expected 2 values"),
        (dict(wd_power_law=[1.0, float("inf")]), r"wd_power_law\[1\] is inf"),
        (dict(objective_optimization="last"), "unknown objective_optimization 'last': expected 'target_new' or"),
        (dict(norm_constraint=True), "norm_constraint is True: expected a number"),
        (dict(rewrite_module_tmp="transformer.wte"), r"rewrite_module_tmp 'transformer.wte': exactly one '{}'"),
    ],
)
def test_what_makes_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FTParams.from_dict({"layers": [1]} | changes)


def test_missing_keys_are_named() -> None:
    with pytest.raises(ValueError, match="FTParams: missing keys layers"):
        FTParams.from_dict({"lr": 5e-4})
