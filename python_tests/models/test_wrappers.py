"""Wrapped models: the very model is traced and edited, under its weights' real names, or it is refused in words."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import knowedit_ext as ke
from knowedit_ext.model import identity
from knowedit_ext.model.weights import find_weight, parameters, stored_weights

from ..support.families import FAMILIES, LAYERS, tiny_hf
from ..support.tokenizers import word_level

FACT = ke.Fact(prompt="w5 w6 {} w9 w10 w11", subject="w3 w7")
IDS = torch.tensor([[3, 4, 5, 6, 7]])


def compiled(hf: nn.Module) -> nn.Module:
    return torch.compile(hf, backend="eager")


def compiled_in_place(hf: nn.Module) -> nn.Module:
    hf.compile(backend="eager")
    return hf


def compiled_inside(hf: nn.Module) -> nn.Module:
    setattr(hf, hf.base_model_prefix, compiled(hf.base_model))
    return hf


def compiled_layers(hf: nn.Module) -> nn.Module:
    layers = next(module for module in hf.modules() if isinstance(module, nn.ModuleList))
    for number, layer in enumerate(layers):
        layers[number] = compiled(layer)
    return hf


def compiled_mlps(hf: nn.Module) -> nn.Module:
    for layer in next(module for module in hf.modules() if isinstance(module, nn.ModuleList)):
        layer.mlp = compiled(layer.mlp)
    return hf


def averaged(hf: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(hf)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "compiled twice": lambda hf: compiled(nn.DataParallel(compiled(hf))),
    "compiled in place": compiled_in_place,
    "compiled inside": compiled_inside,
    "compiled layers": compiled_layers,
    "compiled MLPs": compiled_mlps,
    "data parallel": nn.DataParallel,
    "averaged": averaged,
}


@torch.no_grad()
def logits(hf: nn.Module) -> torch.Tensor:
    return hf(IDS, use_cache=False).logits


@pytest.fixture(params=sorted(WRAPPERS))
def wrapper(request):
    yield WRAPPERS[request.param]
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_names_and_traces_are_those_of_the_plain_model(family: str, wrapper) -> None:
    plain, model = (ke.load_model((hf, word_level())) for hf in (tiny_hf(family), wrapper(tiny_hf(family))))
    assert type(model.hf) is type(plain.hf)
    assert [n for n, _ in stored_weights(model)] == [n for n, _ in plain.hf.named_parameters()]
    for name, tensor in plain.hf.named_parameters():
        assert torch.equal(find_weight(model.hf, name).parameter, tensor)
    want, got = (ke.trace(m, FACT, kind="mlp", window=2, samples=2, noise=0.5) for m in (plain, model))
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_found_where_it_is(family: str) -> None:
    hf = tiny_hf(family)
    for name, tensor in hf.named_parameters():
        weight = find_weight(hf, name)
        assert weight.parameter is tensor and weight.shape == tuple(tensor.shape)
        assert weight.module is weight.holder and getattr(weight.module, name.rpartition(".")[2]) is tensor
    assert not any(each.adapter for each in parameters(hf))
    for name in ("lm_head.nothing", "nothing.weight", "nothing", "", f"{hf.base_model_prefix}.weight"):
        with pytest.raises(ValueError, match="the model has no parameter"):
            find_weight(hf, name)


def test_moments_of_wrapped_models_know_their_weights(wrapper) -> None:
    texts = [f"w{n} w{n + 7} w{n + 3}" for n in range(3, 40)]
    one, two = (ke.load_model((wrapper(tiny_hf("gpt2", seed)), word_level())) for seed in (0, 1))
    moments = ke.collect_moments(one, texts, [1], progress=False)
    plain = ke.load_model((tiny_hf("gpt2"), word_level()))
    want = ke.collect_moments(plain, texts, [1], progress=False)
    assert (
        torch.equal(moments[1].matrix(), want[1].matrix()) and moments[1].origin["weights"] == want[1].origin["weights"]
    )
    moments.check(plain, 1)
    with pytest.raises(ValueError, match="another model"):
        moments.check(two, 1)


@pytest.mark.parametrize("of", ["mlp", "nothing"])
def test_moments_bind_to_no_empty_list_of_weights(of: str, monkeypatch) -> None:
    model = ke.load_model((tiny_hf("gpt2"), word_level()))
    seen = [(name, tensor) for name, tensor in stored_weights(model) if of != "nothing" and "mlp" not in name]
    monkeypatch.setattr(identity, "stored_weights", lambda model: iter(seen))
    with pytest.raises(ValueError, match="has no weights 'transformer.h.1.mlp....' to tell by"):
        ke.collect_moments(model, ["w3 w4"], [1], progress=False)


class Wrapped(nn.Module):
    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.module = hf


@pytest.mark.parametrize("make", [Wrapped, lambda hf: nn.Sequential(hf), lambda hf: nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(make) -> None:
    with pytest.raises(ke.UnsupportedModelError, match="is no Hugging Face decoder: pass .hf_model, tokenizer."):
        ke.load_model((make(tiny_hf("llama")), word_level()))


@pytest.mark.parametrize("handed", [5, None, (1, 2), (tiny_hf("llama"),), [tiny_hf("llama"), word_level()]])
def test_other_objects_are_refused(handed) -> None:
    with pytest.raises(TypeError, match=r"\(hf_model, tokenizer\)"):
        ke.load_model(handed)


def test_a_model_without_a_head_is_refused() -> None:
    hf = tiny_hf("llama")
    hf.get_output_embeddings = lambda: None
    with pytest.raises(ke.UnsupportedModelError, match="no language-model head"):
        ke.load_model((hf, word_level()))


# -- PEFT ------------------------------------------------------------------------------------------------------------

PEFT_TARGETS = {
    "llama": {"attention": ["q_proj", "v_proj"], "down": ["down_proj"], "all": "all-linear"},
    "gpt2": {"attention": ["c_attn"], "down": ["mlp.c_proj"], "all": ["c_attn", "c_proj", "c_fc"]},
}


def lora(family: str, where: str, seed: int = 0) -> nn.Module:
    peft = pytest.importorskip("peft")
    targets, conv1d = PEFT_TARGETS[family][where], family == "gpt2"
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, fan_in_fan_out=conv1d)
    torch.manual_seed(seed)
    model = peft.get_peft_model(tiny_hf(family, seed), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    return model


@pytest.mark.parametrize("where", ["attention", "down", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "outer", [lambda model: model, lambda model: model.base_model, lambda model: model.base_model.model, compiled]
)
def test_a_lora_model_is_traced_as_its_merged_one(family: str, where: str, outer) -> None:
    adapted = lora(family, where)
    model = ke.load_model((outer(adapted), word_level()))
    merged = ke.load_model((copy.deepcopy(adapted).merge_and_unload(), word_level()))
    torch.testing.assert_close(logits(model.hf), logits(adapted))
    assert (logits(merged.hf) - logits(tiny_hf(family))).abs().max() > 1e-2  # the adapter is no small matter
    for kind in ("state", "mlp", "attn"):
        want, got = (ke.trace(m, FACT, kind=kind, window=2, samples=2, noise=0.5) for m in (merged, model))
        np.testing.assert_allclose(got.scores, want.scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_base_weights_are_found_under_an_adapter(family: str) -> None:
    adapted, plain = lora(family, "all"), tiny_hf(family)
    model = ke.load_model((adapted, word_level()))
    for name, tensor in plain.named_parameters():
        assert torch.equal(find_weight(model.hf, name).parameter, tensor)
    for layer in range(LAYERS):
        name = f"{model.modules.parameter_name(layer)}.weight"
        weight = find_weight(model.hf, name)
        assert weight.module is model.modules.down_projection(layer) and weight.holder is weight.module.base_layer
        assert weight.input_first == (family == "gpt2")
    adapters = [each.name for each in parameters(model.hf) if each.adapter]
    assert adapters and all("lora_" in name for name in adapters)
    assert {each.name for each in parameters(model.hf) if not each.adapter} == {n for n, _ in plain.named_parameters()}


def test_moments_of_a_lora_model_know_its_adapter() -> None:
    texts = [f"w{n} w{n + 7} w{n + 3}" for n in range(3, 40)]
    adapted = lora("gpt2", "attention")
    model = ke.load_model((adapted, word_level()))
    moments = ke.collect_moments(model, texts, [1], progress=False)
    moments.check(ke.load_model((copy.deepcopy(adapted), word_level())), 1)
    with pytest.raises(ValueError, match="another model"):
        moments.check(ke.load_model((lora("gpt2", "attention", seed=1), word_level())), 1)
    with pytest.raises(ValueError, match="another model.*no weight '.*lora_A"):
        moments.check(ke.load_model((tiny_hf("gpt2"), word_level())), 1)
    adapted.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="another model"):
        moments.check(model, 1)


OTHER_ADAPTERS: dict[str, tuple[str, dict]] = {
    "prompt tuning": ("PromptTuningConfig", dict(num_virtual_tokens=2)),
    "prefix tuning": ("PrefixTuningConfig", dict(num_virtual_tokens=2)),
    "IA3": ("IA3Config", dict(target_modules=["down_proj"], feedforward_modules=["down_proj"])),
    "LoHa": ("LoHaConfig", dict(r=2, target_modules=["down_proj"])),
    "DoRA": ("LoraConfig", dict(r=2, target_modules=["down_proj"], use_dora=True)),
    "modules_to_save": ("LoraConfig", dict(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])),
    "trainable tokens": ("LoraConfig", dict(r=2, target_modules=["q_proj"], trainable_token_indices=[3])),
}


@pytest.mark.parametrize("kind", OTHER_ADAPTERS)
def test_other_adapters_are_refused(kind: str) -> None:
    peft = pytest.importorskip("peft")
    config, settings = OTHER_ADAPTERS[kind]
    model = peft.get_peft_model(tiny_hf("llama"), getattr(peft, config)(task_type="CAUSAL_LM", **settings))
    for handed in (model, compiled(model)):
        with pytest.raises(ke.UnsupportedModelError, match="without the adapter"):
            ke.load_model((handed, word_level()))


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["folder", "object"])
def test_a_name_tells_no_path(how: str, tmp_path) -> None:
    folder = tmp_path / "where" / "my-model"
    tiny_hf("gpt2").save_pretrained(folder)
    word_level().save_pretrained(folder)
    model = ke.load_model(folder)
    if how == "object":
        model = ke.load_model((model.hf, model.tokenizer))
    assert model.name == "my-model"


@pytest.mark.parametrize(
    "given, name",
    [
        ("gpt2-xl", "gpt2-xl"),
        ("", "GPT2LMHeadModel"),
        ("EleutherAI/gpt-j-6b", "EleutherAI/gpt-j-6b"),
        ("/home/anna/models/my-gpt/", "my-gpt"),
        ("~/models/my-gpt", "my-gpt"),
        ("./my-gpt", "my-gpt"),
        ("/home/anna/.cache/hub/models--org--gpt/snapshots/0123abc", "org/gpt"),
    ],
)
def test_names(given: str, name: str) -> None:
    hf = tiny_hf("gpt2")
    hf.config._name_or_path = given
    assert ke.load_model((hf, word_level())).name == name


# -- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_distributed_model_is_unwrapped(process_group) -> None:
    hf = tiny_hf("llama")
    assert ke.load_model((nn.parallel.DistributedDataParallel(hf), word_level())).hf is hf


def test_sharded_weights_are_refused(process_group) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DeviceMesh, distribute_tensor

    mesh = DeviceMesh("cpu", [0])
    hf = tiny_hf("llama")
    for layer in hf.model.layers:
        fully_shard(layer, mesh=mesh)
    with pytest.raises(ke.UnsupportedModelError, match="'model.layers.0' is sharded by FSDP"):
        ke.load_model((hf, word_level()))
    hf = tiny_hf("llama")
    linear = hf.model.layers[1].mlp.down_proj
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh))
    with pytest.raises(ke.UnsupportedModelError, match="'model.layers.1.mlp.down_proj.weight' is sharded over"):
        ke.load_model((hf, word_level()))


def test_what_quantises_by_the_texts_beside_is_refused() -> None:
    hf = torch.ao.quantization.quantize_dynamic(tiny_hf("llama"), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ke.UnsupportedModelError, match=r"is quantised by torch.ao \(Linear\)"):
        ke.load_model((hf, word_level()))
