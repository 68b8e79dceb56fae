"""`precision`: where float32 GEMMs may be TF32, and that they are nowhere else."""

from __future__ import annotations

import pytest
import torch
from support import families, tokenizers

import knowedit_ext as ke
from knowedit_ext.model.precision import float32_products

MATMUL = torch.backends.cuda.matmul


def build(precision: str | None) -> tuple[ke.EditableModel, list[str]]:
    """A tiny model, and what the setting is inside its layers and its head as they run."""
    model = ke.load_model((families.tiny_hf("gpt2"), tokenizers.word_level()), precision=precision)
    seen: list[str] = []
    for module in (model.modules.down_projection(0), model.modules.head, model.modules.embedding):
        module.register_forward_pre_hook(lambda *_: seen.append(MATMUL.fp32_precision))
    return model, seen


def test_tf32_is_on_in_layers_and_head_alone():
    before = MATMUL.fp32_precision
    model, seen = build("tf32")
    ke.trace(model, ke.Fact("{} w4 w6", "w8"), noise=0.1, samples=2)
    assert set(seen) == {"tf32", before} and MATMUL.fp32_precision == before
    seen.clear()
    model.hf(torch.tensor([[2, 4]]))
    assert seen == [before, "tf32", "tf32"]  # the embedding, a layer, the head


def test_the_setting_comes_back_after_an_error():
    before = MATMUL.fp32_precision
    model, _ = build("tf32")

    def fail(*_):
        raise RuntimeError("in the layer")

    model.modules.down_projection(0).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the layer"):
        model.hf(torch.tensor([[2, 4]]))
    assert MATMUL.fp32_precision == before


def test_moments_are_exact_all_the_same(monkeypatch):
    from knowedit_ext.ops import moment

    model, _ = build("tf32")
    seen = []
    update = moment.update_by_gemm
    monkeypatch.setattr(moment, "update_by_gemm", lambda *a: seen.append(MATMUL.fp32_precision) or update(*a))
    ke.collect_moments(model, ["w2 w4 w6"], [0], progress=False)
    assert seen and set(seen) == {"ieee"}


def test_without_it_nothing_is_touched():
    before = MATMUL.fp32_precision
    model, seen = build(None)
    model.hf(torch.tensor([[2, 4]]))
    assert seen == [before] * 3 and model.precision is None
    with float32_products("tf32"):
        assert MATMUL.fp32_precision == "tf32"
    assert MATMUL.fp32_precision == before


def test_unknown_precision():
    with pytest.raises(ValueError, match="unknown precision 'bf16': expected 'tf32', or None"):
        build("bf16")
