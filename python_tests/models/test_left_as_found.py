"""Tracing leaves the model as it was, and works on models spread over devices and disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

import knowedit_ext as ke

from ..support.families import FAMILIES, LAYERS, tiny_hf
from ..support.tokenizers import word_level
from ..support.unchanged import assert_unchanged, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:corrupting")
FACT = ke.Fact(prompt="w5 w6 {} w9 w10 w11", subject="w3 w7")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_trace(family: str, implementation: str) -> None:
    hf = tiny_hf(family)
    if family not in ("gptj", "gemma2"):  # eager only
        hf.set_attn_implementation(implementation)
    model = ke.load_model((hf, word_level()))
    hf.get_input_embeddings().weight.requires_grad_(False)
    before = snapshot(hf)
    ke.trace(model, FACT, kind="mlp", window=2, samples=2, sever="attn")
    assert_unchanged(before, hf)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
@pytest.mark.parametrize("place", ["layers.1", "mlp", "final_norm", "embedding"])
def test_after_an_exception_inside(family: str, place: str) -> None:
    model = ke.load_model((tiny_hf(family), word_level()))
    modules = model.modules
    broken = {
        "layers.1": modules.layers[1],
        "mlp": modules.mlp(2),
        "final_norm": modules.final_norm,
        "embedding": modules.embedding,
    }[place]
    calls = []

    def fail(module: nn.Module, args: tuple) -> None:  # the clean forward passes through once
        calls.append(module)
        if len(calls) > 1:
            raise RuntimeError("broken on purpose")

    hook = broken.register_forward_pre_hook(fail)
    before = snapshot(model.hf)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        ke.trace(model, FACT, kind="attn", window=2, samples=2, noise=0.5)
    assert_unchanged(before, model.hf)
    hook.remove()
    assert np.isfinite(ke.trace(model, FACT, samples=2, noise=0.5).scores).all()


def test_gradients_still_flow_afterwards() -> None:
    model = ke.load_model((tiny_hf("gpt2"), word_level()))
    ke.trace(model, FACT, samples=2, noise=0.5)
    model.hf(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert model.modules.down_projection(0).weight.grad is not None


def spread(hf: nn.Module, how: str, folder) -> nn.Module:
    if how == "one device":
        return dispatch_model(hf, device_map={"": "cpu"}, force_hooks=True)
    if how == "disk":
        return disk_offload(hf, folder, execution_device=torch.device("cpu"))
    if how == "memory":
        return cpu_offload(hf, execution_device=torch.device("cpu"))
    base, (layers, *_) = hf.base_model_prefix, [n for n, m in hf.named_modules() if isinstance(m, nn.ModuleList)]
    parts = [f"{base}.{name}" for name, _ in getattr(hf, base).named_children() if f"{base}.{name}" != layers]
    where = {name: "cpu" for name in [*parts, "lm_head" if hasattr(hf, "lm_head") else "embed_out"]}
    where |= {f"{layers}.{n}": "disk" if n % 2 else "cpu" for n in range(LAYERS)}
    return dispatch_model(hf, device_map=where, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("how", ["one device", "disk", "memory", "some layers on disk"])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "llama", "gemma2"])
def test_spread_models_give_the_same_trace(family: str, how: str, tmp_path) -> None:
    plain = ke.load_model((tiny_hf(family), word_level()))
    model = ke.load_model((spread(tiny_hf(family), how, tmp_path), word_level()))
    asked = dict(kind="mlp", window=2, samples=2, noise=0.5, sever="attn")
    want, got = ke.trace(plain, FACT, **asked), ke.trace(model, FACT, **asked)
    assert np.ptp(want.scores) > 1e-4
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-6, rtol=0)
    assert (got.low_score, got.high_score) == pytest.approx((want.low_score, want.high_score), abs=1e-6)
    rule = ke.noise_level(model, "s3", subjects=["w3 w7", "w8"])
    assert rule == pytest.approx(ke.noise_level(plain, "s3", subjects=["w3 w7", "w8"]))


def test_device_map_by_folder(tmp_path) -> None:
    hf = tiny_hf("llama")
    hf.save_pretrained(tmp_path / "model")
    word_level().save_pretrained(tmp_path / "model")
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{n}": "disk" if n > 1 else "cpu" for n in range(LAYERS)}
    model = ke.load_model(tmp_path / "model", device_map=where, offload_folder=tmp_path / "off")
    got = ke.trace(model, FACT, samples=2, noise=0.5)
    want = ke.trace(ke.load_model((hf, word_level())), FACT, samples=2, noise=0.5)
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-6, rtol=0)
