"""A sweep is measured against the model itself before its first result: sound models pass, planted faults do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from packaging.version import Version
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.llama import modeling_llama

import knowedit_ext as ke
from knowedit_ext.editing.edit import LowRank
from knowedit_ext.model import families, head
from knowedit_ext.moments.forward import visit_keys
from knowedit_ext.sweep import attention, clean_run
from knowedit_ext.sweep.capture import clean_runs
from knowedit_ext.sweep.packed import PackedPrompts
from knowedit_ext.sweep.probe import probe

from ..support.families import FAMILIES, VOCAB, WIDTH, WINDOWED, tiny_hf
from ..support.more_families import more_model
from ..support.strangers import gpt_oss, stranger
from ..support.tokenizers import word_level

FACT = ke.Fact(prompt="w5 w6 {} w9 w10 w11", subject="w3 w7")
HALVES = (torch.bfloat16, torch.float16)
OFF = "the logits of a sweep are off by"


def tiny(family: str, dtype: torch.dtype = torch.float32, **overrides) -> ke.EditableModel:
    return ke.load_model((tiny_hf(family, **overrides).to(dtype), word_level(VOCAB)))


# -- what is sound ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_model_passes(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    probe(model)
    assert model.probed


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_deep_and_touchy_model_passes(dtype: torch.dtype, seed: int) -> None:
    probe(tiny("llama", dtype, seed=seed, num_hidden_layers=32))


@pytest.mark.parametrize(
    "sizes", [dict(max_position_embeddings=2), dict(sliding_window=60, max_position_embeddings=100)], ids=str
)
def test_few_positions_and_longer_windows(sizes: dict) -> None:
    probe(tiny("mistral", **sizes))


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_an_offloaded_model_passes(offload: Callable, tmp_path) -> None:
    hf = tiny_hf("llama")
    offload(hf, str(tmp_path)) if offload is disk_offload else offload(hf, torch.device("cpu"))
    probe(ke.load_model((hf, word_level(VOCAB))))


def test_an_edited_model_passes() -> None:
    model = tiny("gpt2")
    name = "transformer.h.1.mlp.c_proj.weight"
    inputs, outputs = torch.randn(4 * WIDTH, 1), torch.randn(WIDTH, 1)
    with ke.Edit({name: LowRank(inputs, outputs, True)}).applied(model):
        probe(model)


# -- when it is measured ---------------------------------------------------------------------------------------------


def packed(model: ke.EditableModel) -> None:
    PackedPrompts(model, [clean_run(model, [5, 6, 7])])


DOORS = {
    "trace": lambda model: ke.trace(model, FACT, samples=2, noise=0.5),
    "packed prompts": packed,
    "moments": lambda model: visit_keys(model, torch.tensor([[5, 6, 7]]), [1], lambda layer, keys: None),
}


@pytest.mark.filterwarnings("ignore:corrupting")
@pytest.mark.parametrize("door", DOORS)
def test_every_door_is_behind_it(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    with monkeypatch.context() as patch:
        wrong_attention(patch, scale=1.5)
        for _ in range(2):  # a refusal is not forgotten
            with pytest.raises(ke.UnsupportedModelError, match=OFF):
                DOORS[door](model)
    DOORS[door](model)
    assert model.probed
    wrong_attention(monkeypatch, scale=1.5)
    DOORS[door](model)  # measured once


def test_logits_that_are_not_finite_are_left_to_others() -> None:
    model = tiny("gpt2")
    model.hf.lm_head.weight.data[3] = torch.nan
    probe(model)
    assert not model.probed


# -- planted faults --------------------------------------------------------------------------------------------------


def wrong_attention(patch: pytest.MonkeyPatch, scale: float = 1.0, **given) -> None:
    right = attention.tree_attention

    def wrong(q, k, v, table, scaling, window, softcap, sinks, bias, frozen):
        own = {"window": window, "softcap": softcap, "sinks": sinks, "bias": bias}
        return right(q, k, v, table, scaling * scale, frozen=frozen, **(own | given))

    patch.setattr(attention, "tree_attention", wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_scale(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_attention(monkeypatch, scale=1.02)
    model = tiny(family)
    with pytest.raises(ke.UnsupportedModelError, match=f"{OFF} .*{type(model.modules.attn(0)).__name__}") as raised:
        probe(model)
    own = model.modules.attn(0).config._attn_implementation
    assert ('attn_implementation="eager"' in str(raised.value)) == (own != "eager")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_wrong_scale_in_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_attention(monkeypatch, scale=1.5)
    with pytest.raises(ke.UnsupportedModelError, match=OFF):
        probe(tiny("llama", dtype))


@pytest.mark.parametrize("family", WINDOWED)
def test_a_forgotten_window(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_attention(monkeypatch, window=0)
    with pytest.raises(ke.UnsupportedModelError, match=OFF):
        probe(tiny(family))


def test_a_forgotten_soft_cap_of_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_attention(monkeypatch, softcap=0.0)
    with pytest.raises(ke.UnsupportedModelError, match=OFF):
        probe(tiny("gemma2"))


def test_dropped_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_attention(monkeypatch, sinks=None)
    with pytest.raises(ke.UnsupportedModelError, match=f"GptOss.*{OFF}"):
        probe(gpt_oss(monkeypatch))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    "kind, config, factor", [("cohere", dict(logit_scale=0.25), "0.25"), ("granite", dict(logits_scaling=4.0), "0.25")]
)
def test_a_forgotten_scale_of_the_logits(
    kind: str, config: dict, factor: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes as it is; without the scale the message says which factor is missing."""
    model = stranger(kind, monkeypatch, **config)
    model.hf.to(dtype)
    probe(model)
    model.probed = False
    monkeypatch.setattr(head.LogitForm, "of", classmethod(lambda cls, modules: cls()))
    with pytest.raises(ke.UnsupportedModelError, match=f"{OFF} .* a factor of {factor[:3]}"):
        probe(model)


def test_a_layer_that_looks_at_neighbouring_rows() -> None:
    """A convolution or the like: right for one prompt, wrong for rows of several."""
    model = tiny("llama")

    def mix(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], dim=1)

    model.modules.layers[1].register_forward_hook(mix)
    with pytest.raises(ke.UnsupportedModelError, match=OFF):
        probe(model)


def test_attention_that_is_not_causal() -> None:
    """Every position of the model sees all others; a sweep's do not."""
    model = tiny("llama", attn_implementation="sdpa")
    for layer in model.modules.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
        )
        layer.self_attn.is_causal = False
    with pytest.raises(ke.UnsupportedModelError, match=OFF):
        probe(model)


def test_a_long_window_that_is_in_the_mask_alone() -> None:
    """Longer than what is measured at loading: refused with the first prompt that is longer than the window."""
    model = tiny("qwen2", sliding_window=70, max_position_embeddings=100)
    for layer in model.modules.layers:
        layer.self_attn.sliding_window = None
    probe(model)
    for length in (70, 75):
        packed = PackedPrompts(model, clean_runs(model, [[5 + n % 50 for n in range(length)]]))
        if length == 70:
            packed.run(packed.start, 0, model.num_layers)
            continue
        with pytest.raises(ke.UnsupportedModelError, match="mask lets tokens see the last 70 of 75 positions"):
            packed.run(packed.start, 0, model.num_layers)


def test_a_mask_that_is_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first positions are seen by all."""
    right = modeling_llama.create_causal_mask

    def prefix(*args, **kwargs) -> torch.Tensor:
        mask = right(*args, **kwargs)
        mask[..., :3] = 0
        return mask

    monkeypatch.setattr(modeling_llama, "create_causal_mask", prefix)
    with pytest.raises(ke.UnsupportedModelError, match="mask lets tokens see what is no sliding window"):
        probe(tiny("llama", attn_implementation="eager"))


def test_arguments_that_hang_on_the_tokens() -> None:
    model, last = tiny("llama"), []
    model.modules.embedding.register_forward_hook(lambda module, args, out: last.append(1 + 0.01 * args[0].sum()))
    model.hf.model.rotary_emb.register_forward_hook(lambda module, args, out: tuple(last[-1] * x for x in out))
    with pytest.raises(
        ke.UnsupportedModelError, match="passes its layers a 'position_embeddings' that hangs on the tok"
    ):
        probe(model)


def test_a_model_that_says_something_else_with_a_cache() -> None:
    model = tiny("llama")

    def act(module: nn.Module, args: tuple, kwargs: dict, out: tuple) -> tuple | None:
        kept = any(kwargs.get(name) is not None for name in ("past_key_values", "cache"))
        return (1.1 * out[0], *out[1:]) if kept else None

    model.modules.attn(1).register_forward_hook(act, with_kwargs=True)
    with pytest.raises(ke.UnsupportedModelError, match="says something else when it keeps no cache"):
        probe(model)


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="this transformers has no Gemma 4")
def test_layers_that_hand_each_other_keys() -> None:
    """Older versions do so by the cache, which a sweep has not."""
    model = more_model("gemma4_text", num_kv_shared_layers=2, hidden_size_per_layer_input=6)
    if Version(transformers.__version__) >= Version("5.24"):
        return probe(model)
    with pytest.raises(ke.UnsupportedModelError, match="says something else when it keeps no cache"):
        probe(model)


@pytest.mark.parametrize("named", ["up_projection", "gate_projection"])
def test_another_projection_in_the_place_of_the_down_projection(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = families.FAMILIES["llama"]
    monkeypatch.setitem(families.FAMILIES, "llama", replace(line, down_projection=getattr(line, named)))
    model = tiny("llama", intermediate_size=WIDTH)  # square: shapes do not tell
    with pytest.raises(ke.UnsupportedModelError, match="puts out is not what the MLP does"):
        probe(model)
