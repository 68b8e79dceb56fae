"""Quantised models of the libraries in use. Each is skipped where its library is not installed."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig

import knowedit_ext as ke
from knowedit_ext.editing.rows import EditedRows
from knowedit_ext.model.weights import find_weight

from ..support.families import tiny_hf
from ..support.tokenizers import word_level
from .models import fresh
from .plain import moments_of
from .test_edit import REQUEST, random_edit
from .test_wrapped import MEMIT, ROME, logits, made

CONFIGS = {
    "quanto int8": ("optimum.quanto", lambda: QuantoConfig(weights="int8")),
    "quanto int4": ("optimum.quanto", lambda: QuantoConfig(weights="int4")),
    "bitsandbytes 8 bits": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes 4 bits": (
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    ),
}
SIZES = dict(hidden_size=64, intermediate_size=128)


@pytest.fixture(params=sorted(CONFIGS))
def quantised(request, tmp_path):
    library, config = CONFIGS[request.param]
    pytest.importorskip(library)
    tiny_hf("llama", **SIZES).save_pretrained(tmp_path)
    load = lambda: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        tmp_path, quantization_config=config(), dtype=torch.float32
    )
    return lambda: ke.load_model((load(), word_level()))


def plain() -> ke.EditableModel:
    return ke.load_model((tiny_hf("llama", **SIZES), word_level()))


def some_edit() -> ke.Edit:
    return random_edit(plain())


def test_edits_stand_beside_quantised_weights(quantised, caplog) -> None:
    """What they add is what the module's answers differ by; the weights stay, bit for bit."""
    model, edit = quantised(), some_edit()
    for name in edit.changes:
        assert find_weight(model.hf, name).parameter is None
    before = logits(model.hf)
    answers = {}
    row = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    modules = {name: find_weight(model.hf, name).module for name in edit.changes}
    with torch.no_grad():
        for name, module in modules.items():
            answers[name] = module(row)
        with edit.applied(model):
            moved = (logits(model.hf) - before).abs().max()
            for name, module in modules.items():
                added = row.double() @ edit.delta(name).T
                torch.testing.assert_close((module(row) - answers[name]).double(), added, rtol=1e-3, atol=1e-3)
    assert moved > 1e-2
    assert torch.equal(logits(model.hf), before)
    dense = ke.Edit({name: edit.delta(name) for name in edit.changes})
    with pytest.raises(ValueError, match="quantised: only a low-rank change"):
        dense.apply(model)
    with EditedRows(model, [edit]).rows(torch.tensor([0])):
        assert (logits(model.hf) - before).abs().max() > 1e-2


def test_edits_know_the_quantised_base(quantised, caplog) -> None:
    """Whether or not it has computed anything before: bitsandbytes packs its weights at the first product."""
    model, other = quantised(), quantised()
    before = logits(other.hf)
    edit = some_edit().bind(model)
    assert [row[0] for row in edit.base.values()] == ["quantised"] * len(edit.changes)
    edit.apply(other)
    edit.revert(other)
    assert some_edit().bind(other).base == edit.base
    assert torch.equal(logits(other.hf), before)  # looking changes nothing
    edit.apply(plain())  # cannot be compared, which is said
    with caplog.at_level(logging.WARNING):
        some_edit().bind(plain()).apply(model)
    assert "cannot be told" in caplog.text


def test_moments_of_a_quantised_model(quantised) -> None:
    texts = [f"w{n} w{n + 7} w{n + 3}" for n in range(3, 40)]
    moments = ke.collect_moments(quantised(), texts, [1], progress=False)
    again = quantised()
    before = logits(again.hf)
    moments.check(again, 1)
    assert torch.equal(logits(again.hf), before)
    with pytest.raises(ValueError, match="another model"):
        moments.check(plain(), 1)


def test_fine_tuning_is_refused(quantised) -> None:
    with pytest.raises(ValueError, match="'model.layers.1.mlp.down_proj.weight' is quantised"):
        made(quantised(), "ft")


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_edits_are_made_where_gradients_pass(quantised, method: str) -> None:
    model = quantised()
    before = logits(model.hf)
    try:
        edit = made(model, method)
    except ValueError as error:
        assert "no gradient passes 'model.layers." in str(error) and "4bit" in str(error)
        return
    want = made(plain(), method)
    for name in want.changes:
        assert 0.3 < float(edit.delta(name).norm() / want.delta(name).norm()) < 3
    with edit.applied(model):
        assert (logits(model.hf) - before).abs().max() > 1e-2


def test_edits_stand_beside_quantised_weights_with_an_adapter(quantised) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(quantised().hf, config).eval()
    model, edit = ke.load_model((adapted, word_level())), some_edit()
    before = logits(adapted)
    with edit.applied(model):
        changed = logits(adapted)
    assert (changed - before).abs().max() > 1e-2 and torch.equal(logits(adapted), before)
    with EditedRows(model, [edit]).rows(torch.tensor([0])):
        torch.testing.assert_close(logits(model.hf), changed, rtol=1e-3, atol=1e-3)
    ke.trace(model, ke.Fact("w5 {} w9", "w3 w7"), samples=1, noise=0.5)
    with pytest.raises(ValueError, match="quantised"):
        made(model, "ft")


# -- gradients -------------------------------------------------------------------------------------------------------


class Inference(torch.nn.Module):
    """A stand-in for products without a backward pass."""

    def __init__(self, linear: torch.nn.Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        self.register_buffer("weight", linear.weight.detach().clone())
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.kind == "raises" and x.requires_grad:
            raise RuntimeError("derivative for this is not implemented")
        if self.kind == "zero":
            return x * 0 @ self.weight.T + (x.detach() @ self.weight.T)
        if self.kind == "later" and self.calls == 1:  # the first product does
            return x @ self.weight.T
        return x.detach() @ self.weight.T


@pytest.mark.parametrize("kind", ["detached", "zero", "raises", "later"])
@pytest.mark.parametrize("where", ["self_attn.v_proj", "mlp.up_proj", "head"])
@pytest.mark.parametrize("method", ["rome", "memit", "ft"])
def test_no_edit_without_a_gradient(method: str, where: str, kind: str) -> None:
    """Also where the rest of the model passes one on, which would give another value without a word."""
    model = fresh("llama")
    name = "lm_head" if where == "head" else f"model.layers.3.{where}"
    model.hf.set_submodule(name, Inference(model.hf.get_submodule(name), kind))
    model = ke.load_model((model.hf, model.tokenizer))
    with pytest.raises(ValueError, match=f"no gradient passes '{name}' .Inference"):
        made(model, method)
    assert not model.applied_edits


def test_no_value_that_a_gradient_never_reaches() -> None:
    """What is not asked module by module: the answer does not depend on the prompt at all."""
    model = fresh("llama")
    model.hf.model.norm.register_forward_hook(lambda module, args, output: output.detach() + 0 * output)
    for method in ("rome", "memit"):
        with pytest.raises(ValueError, match="no gradient reaches the value of 'w5 w3 w7 w9"):
            made(model, method)


# -- offloaded -------------------------------------------------------------------------------------------------------


@pytest.fixture
def offloaded(tmp_path) -> ke.EditableModel:
    folder = tmp_path / "model"
    tiny_hf("llama").save_pretrained(folder)
    word_level().save_pretrained(folder)
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(4)}
    return ke.load_model(folder, device_map=where, offload_folder=tmp_path / "off")


def some_moments() -> ke.Moments:
    return moments_of(ke.load_model((tiny_hf("llama"), word_level())), (0, 1, 2))


DOORS = {
    "rome": lambda model, edit: ke.rome(model, REQUEST, ROME, moments=some_moments(), contexts=["{}"]),
    "memit": lambda model, edit: ke.memit(model, REQUEST, MEMIT, moments=some_moments(), contexts=[["{}"]]),
    "ft": lambda model, edit: made(model, "ft"),
    "apply": lambda model, edit: edit.apply(model),
    "applied": lambda model, edit: edit.applied(model).__enter__(),
    "rounding": lambda model, edit: edit.rounding(model),
    "bind": lambda model, edit: edit.bind(model),
    "rows": lambda model, edit: EditedRows(model, [edit]),
}


@pytest.mark.parametrize("door", DOORS)
def test_offloaded_layers_are_refused_by_name(door: str, offloaded) -> None:
    edit = random_edit(ke.load_model((tiny_hf("llama"), word_level())), layers=(0, 1))
    before = [p.clone() for p in offloaded.hf.parameters() if not p.is_meta]
    computed = []
    hook = offloaded.modules.layers[0].register_forward_pre_hook(lambda *args: computed.append(args))
    with pytest.raises(ValueError, match="'model.layers.1.* is offloaded"):
        DOORS[door](offloaded, edit)
    hook.remove()
    assert not computed and not offloaded.applied_edits
    kept = [p for p in offloaded.hf.parameters() if not p.is_meta]
    assert all(torch.equal(one, other) for one, other in zip(before, kept, strict=True))


def test_layers_in_memory_are_edited_while_others_are_offloaded(offloaded) -> None:
    moments = some_moments()
    params = ke.ROMEParams(**(ROME.to_dict() | {"layers": [2]}))
    edits = [
        ke.rome(model, REQUEST, params, moments=moments, contexts=["{}"])
        for model in (offloaded, ke.load_model((tiny_hf("llama"), word_level())))
    ]
    [name] = edits[0].changes
    torch.testing.assert_close(edits[0].delta(name), edits[1].delta(name), rtol=1e-3, atol=1e-4)
    before = logits(offloaded.hf)
    with edits[0].applied(offloaded):
        assert (logits(offloaded.hf) - before).abs().max() > 1e-2
