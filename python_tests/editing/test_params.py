"""Hyper-parameters: published files, presets, and what makes no sense."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from knowedit_ext.editing.methods import METHODS
from knowedit_ext.editing.methods.alphaedit import AlphaEditParams
from knowedit_ext.editing.methods.finetune import FTParams
from knowedit_ext.editing.methods.memit import MEMITParams
from knowedit_ext.editing.methods.r_rome import RROMEParams
from knowedit_ext.editing.methods.rome import ROMEParams

# The keys of the published files (hparams/ROME/gpt2-xl.json and hparams/MEMIT/gpt2-xl.json).
SHARED = {
    "fact_token": "subject_last",
    "v_num_grad_steps": 20,
    "v_lr": 5e-1,
    "v_loss_layer": 47,
    "v_weight_decay": 0.5,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "transformer.wte",
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
}
ROME = SHARED | {"layers": [17], "clamp_norm_factor": 4, "context_template_length_params": [[5, 10], [10, 10]]}
MEMIT = SHARED | {
    "layers": [13, 14, 15, 16, 17],
    "clamp_norm_factor": 0.75,
    "layer_selection": "all",
    "mom2_update_weight": 20000,
}


def test_the_published_keys() -> None:
    rome = ROMEParams.from_dict(ROME)
    assert rome.layers == (17,) and rome.clamp_norm_factor == 4 and rome.v_loss_layer == 47
    assert rome.context_template_length_params == ((5, 10), (10, 10))
    memit = MEMITParams.from_dict(MEMIT)
    assert memit.layers == (13, 14, 15, 16, 17) and memit.mom2_update_weight == 20000


@pytest.mark.parametrize("cls, published", [(ROMEParams, ROME), (MEMITParams, MEMIT)])
def test_files_and_back(cls, published: dict, tmp_path) -> None:
    params, file = cls.from_dict(published), tmp_path / "params.json"
    file.write_text(json.dumps(published))
    assert cls.from_json(file) == params
    assert cls.from_dict(json.loads(json.dumps(params.to_dict()))) == params
    assert hash(params) == hash(cls.from_dict(published))
    file.write_text("{")
    with pytest.raises(ValueError, match="params.json' is not JSON"):
        cls.from_json(file)
    file.write_text("[1]")
    with pytest.raises(ValueError, match="params.json' holds no object"):
        cls.from_json(file)
    file.write_text('{"layers": [1], "v_lr": "fast"}')
    with pytest.raises(ValueError, match="params.json': v_lr is 'fast'"):
        cls.from_file(file)
    with pytest.raises(ValueError, match="params.toml' is no file of parameters: expected .json, .yaml or .yml"):
        cls.from_file(tmp_path / "params.toml")


@pytest.mark.parametrize("cls", [ROMEParams, MEMITParams])
def test_presets(cls) -> None:
    for name in cls.presets:
        params = cls.preset(name)
        assert cls.from_dict(params.to_dict()) == params
    assert {"gpt2-xl", "gpt-j", "gpt-neox", "world"} <= cls.presets.keys()
    with pytest.raises(ValueError, match=f"no {cls.__name__} preset 'gpt5': there are .*gpt2-xl"):
        cls.preset("gpt5")


def test_published_presets() -> None:
    shared = dict(v_lr=0.5, v_weight_decay=0.5, kl_factor=0.0625)
    layers = {"gpt2-medium": 8, "gpt2-large": 12, "gpt2-xl": 17, "gpt-j": 5, "gpt-neox": 15}
    for name, layer in layers.items():
        clamp = 3.0 if name == "gpt2-medium" else 4.0
        assert ROMEParams.preset(name) == ROMEParams((layer,), clamp_norm_factor=clamp, v_num_grad_steps=20, **shared)
    assert MEMITParams.preset("gpt2-xl") == MEMITParams(
        tuple(range(13, 18)), v_num_grad_steps=20, clamp_norm_factor=0.75, mom2_update_weight=20000.0, **shared
    )
    assert MEMITParams.preset("gpt-j") == MEMITParams(
        tuple(range(3, 9)), v_num_grad_steps=25, clamp_norm_factor=0.75, mom2_update_weight=15000.0, **shared
    )


# What EasyEdit (hparams/*/llama-7b, mistral-7b, qwen2.5-7b) and AlphaEdit (hparams/*/Llama3-8B) set, in full.
STARTS = dict(fact_token="subject_last", v_num_grad_steps=25, kl_factor=0.0625, mom2_adjustment=True)
EASYEDIT = STARTS | dict(v_lr=5e-1, v_weight_decay=1e-3, clamp_norm_factor=4)
ALPHAEDIT = STARTS | dict(v_lr=1e-1, v_weight_decay=0.5, clamp_norm_factor=0.75)


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "mistral-7b", "qwen2.5-7b"])
def test_starting_points(name: str) -> None:
    settings = ALPHAEDIT if name == "llama-3-8b" else EASYEDIT
    assert MEMITParams.preset(name) == MEMITParams((4, 5, 6, 7, 8), mom2_update_weight=15000, **settings)
    assert ROMEParams.preset(name) == ROMEParams((5,), **EASYEDIT)


@pytest.mark.parametrize(
    "cls, changes, message",
    [
        (ROMEParams, dict(layer=3, lr=1), "ROMEParams: unknown keys layer, lr; known: .*clamp_norm_factor"),
        (MEMITParams, dict(steps=3), "MEMITParams: unknown keys steps"),
        (ROMEParams, dict(layers=[]), "layers is empty"),
        (ROMEParams, dict(layers=[3, 1]), r"layers \[3, 1\]: expected different layers in ascending order"),
        (ROMEParams, dict(layers=[3, 3]), r"layers \[3, 3\]"),
        (ROMEParams, dict(fact_token="first"), "unknown fact_token 'first': expected one of 'subject_last'"),
        (ROMEParams, dict(v_num_grad_steps=0), "v_num_grad_steps is 0"),
        (ROMEParams, dict(v_lr=0), "v_lr is 0"),
        (ROMEParams, dict(v_lr=float("nan")), "v_lr is nan"),
        (ROMEParams, dict(v_lr="fast"), "v_lr is 'fast': expected a number"),
        (ROMEParams, dict(v_lr=True), "v_lr is True: expected a number"),
        (ROMEParams, dict(v_lr=[0.5]), r"v_lr is \[0.5\]: expected a number"),
        (ROMEParams, dict(v_num_grad_steps=5.5), "v_num_grad_steps is 5.5: expected a whole number"),
        (ROMEParams, dict(v_num_grad_steps=None), "v_num_grad_steps is None: expected a whole number"),
        (ROMEParams, dict(v_weight_decay=-0.5), "v_weight_decay is -0.5: expected at least 0"),
        (ROMEParams, dict(kl_factor="-inf"), "kl_factor is '-inf': expected a number, and a finite one"),
        (ROMEParams, dict(mom2_adjustment=1), "mom2_adjustment is 1: expected true or false"),
        (ROMEParams, dict(fact_token=3), "unknown fact_token 3"),
        (ROMEParams, dict(layers="3, 4"), r"layers\[0\] is '3, 4': expected a whole number"),
        (ROMEParams, dict(layers={3: 4}), "layers is {3: 4}: expected a list"),
        (ROMEParams, dict(layers=[True]), r"layers\[0\] is True: expected a whole number"),
        (ROMEParams, dict(context_template_length_params=[[5, 10, 1]]), r"params\[0\] is \[5, 10, 1\]: expected 2"),
        (ROMEParams, dict(context_template_length_params=5), "context_template_length_params is 5: expected a list"),
        (RROMEParams, dict(original_implementation=True), "original_implementation is True: only False is supported"),
        (ROMEParams, dict(alg_name="MEMIT"), "unknown alg_name 'MEMIT': expected 'ROME'"),
        (ROMEParams, dict(alg_name="R-ROME"), "unknown alg_name 'R-ROME': expected 'ROME'"),
        (RROMEParams, dict(alg_name="MEMIT"), "unknown alg_name 'MEMIT': expected 'ROME' or 'R-ROME'"),
        (MEMITParams, dict(alg_name="EMMET"), "unknown alg_name 'EMMET': expected 'MEMIT'"),
        (MEMITParams, dict(alg_name="AlphaEdit"), "unknown alg_name 'AlphaEdit': expected 'MEMIT'"),
        (AlphaEditParams, dict(nullspace_threshold=0.02, nullspace_share=0.1), "two ways to tell the null space"),
        (MEMITParams, dict(nullspace_threshold=0.02, L2=10), "MEMITParams: unknown keys nullspace_threshold, L2"),
        (MEMITParams, {3: 4}, "MEMITParams: unknown keys 3; known"),
        (ROMEParams, dict(clamp_norm_factor=-1), "clamp_norm_factor is -1"),
        (MEMITParams, dict(mom2_update_weight=0), "mom2_update_weight is 0"),
        (MEMITParams, dict(layer_selection="random"), "unknown layer_selection 'random': expected 'all'"),
    ],
)
def test_what_makes_no_sense(cls, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls.from_dict({"layers": [1]} | changes)


def test_missing_keys_are_named() -> None:
    with pytest.raises(ValueError, match="MEMITParams: missing keys layers"):
        MEMITParams.from_dict({"v_lr": 0.5})


def test_what_stands_for_a_number() -> None:
    want = ROMEParams(layers=(3,), v_lr=0.5, v_num_grad_steps=5, clamp_norm_factor=4.0)
    steps = (5, 5.0, "5", "5.0", np.int64(5), np.float32(5))
    for layers, lr, count in zip(
        (3, [3], "3", range(3, 4), np.array([3]), (3.0,)), (0.5, "5e-1") * 3, steps, strict=True
    ):
        made = ROMEParams(layers=layers, v_lr=lr, v_num_grad_steps=count, clamp_norm_factor="4")
        assert made == want and hash(made) == hash(want) and repr(made) == repr(want)
    assert json.loads(json.dumps(ROMEParams(layers=np.arange(2)).to_dict()))["layers"] == [0, 1]


# What the files of EasyEdit and AlphaEdit hold beyond the method's own keys.
LOADING = """
alg_name: {name}
model_name: ./hugging_cache/some-model
stats_dir: ./data/stats
device: 0
model_parallel: false
fp16: true
batch_size: 1
max_length: 40
rewrite_module_tmp: model.layers.{{}}.mlp.down_proj
layers: [5]
"""
VALUES = """
fact_token: subject_last
v_num_grad_steps: 25
v_lr: 5e-1
v_loss_layer: 31
v_weight_decay: 1e-3
clamp_norm_factor: 4
kl_factor: 0.0625
mom2_dataset: wikipedia
"""
EXTRAS = {
    "ROME": VALUES + "mom2_adjustment: false\ncontext_template_length_params: [[5, 10], [10, 10]]",
    "R-ROME": VALUES + "original_implementation: false\nenable_prompt_keys: false\nenable_random_prefix_keys: true",
    "MEMIT": VALUES + "layer_selection: all\nmom2_update_weight: 15000",
    "AlphaEdit": VALUES + "mom2_update_weight: 15000\nnullspace_threshold: 2e-2\nL2: 10\nP_loc: null_space_project.pt",
    "FT": "num_steps: 25\nlr: 5e-4\nweight_decay: 0\nkl_factor: 0\nnorm_constraint: 5e-5\n"
    "objective_optimization: target_new",
}
KINDS = {"ROME": ROMEParams, "R-ROME": RROMEParams, "MEMIT": MEMITParams, "AlphaEdit": AlphaEditParams, "FT": FTParams}


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_files_of_other_code(name: str, suffix: str, tmp_path) -> None:
    """YAML 1.1 reads 5e-1 as text, which the JSON written from it keeps."""
    file, content = tmp_path / f"llama{suffix}", LOADING.format(name=name) + EXTRAS[name]
    file.write_text(json.dumps(yaml.safe_load(content)) if suffix == ".json" else content)
    params = KINDS[name].from_file(file)
    assert params.layers == (5,)
    if name == "FT":
        assert (params.lr, params.norm_constraint, params.objective_optimization) == (5e-4, 5e-5, "target_new")
        assert params.batch_size == 1
    else:
        assert (params.v_lr, params.v_weight_decay, params.v_loss_layer) == (0.5, 1e-3, 31)
    with pytest.raises(ValueError, match=f"llama{suffix}': .*unknown keys v_rl"):
        file.write_text(content.replace("kl_factor", "v_rl"))
        KINDS[name].from_yaml(file)


@pytest.mark.parametrize("layers", [-1, [-1], [1, -2], ["-1"], [-1e308]])
@pytest.mark.parametrize("method", METHODS)
def test_no_method_has_negative_layers(method: str, layers: object) -> None:
    with pytest.raises(ValueError, match="layers"):
        METHODS[method].params_of({"layers": layers})
