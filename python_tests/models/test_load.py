"""Loading models, their module maps, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizer
from transformers.models.dbrx import DbrxConfig
from transformers.models.t5 import T5Config
from transformers.models.xglm import XGLMConfig

import knowedit_ext as ke
from knowedit_ext.model import families

from ..support.families import FAMILIES, LAYERS, POSITIONS, WIDTH, tiny_hf, tiny_model
from ..support.tokenizers import byte_bpe, word_level


@pytest.fixture
def folder(tmp_path):
    tiny_hf("gpt2").save_pretrained(tmp_path)
    word_level().save_pretrained(tmp_path)
    return tmp_path


def test_by_folder(folder) -> None:
    model = ke.load_model(folder)
    assert model.num_layers == LAYERS and model.hidden_size == WIDTH and model.dtype == torch.float32
    assert model.device == torch.device("cpu") and not model.hf.training and repr(folder.name) in repr(model)
    assert ke.load_model(str(folder)).tokenizer.tokenize("w3 w4") == ["w3", "w4"]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_dtype(folder, dtype) -> None:
    want = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    assert ke.load_model(folder, dtype=dtype).dtype == want
    assert ke.load_model((tiny_hf("llama"), word_level()), dtype=dtype).dtype == want


@pytest.mark.parametrize("part", ["", "wte", "h.2"])
def test_what_has_no_weights_in_memory(part: str) -> None:
    """Which also shows that `device` moves a model."""
    hf = tiny_hf("gpt2")
    hf.transformer.get_submodule(part).to("meta")
    with pytest.raises(ValueError, match="the model's (embedding|layer 2) is on the meta device: it has no weights"):
        ke.load_model((hf, word_level()))
    with pytest.raises(ValueError, match="meta device"):
        ke.load_model((tiny_hf("gpt2"), word_level()), device="meta")


def test_a_loaded_model_is_taken_as_it_is_or_as_asked() -> None:
    model = ke.load_model((tiny_hf("gpt2", vocab_size=340), byte_bpe()))
    assert ke.load_model(model) is model
    again = ke.load_model(model, dtype="float64", bos=True)
    assert again.dtype == torch.float64 and again.bos is True and again.hf is model.hf


def test_a_tokenizer_larger_than_the_embedding() -> None:
    with pytest.raises(ValueError, match="tokenizer has 340 tokens, the model's embedding 339 rows: token 339"):
        ke.load_model((tiny_hf("gpt2", vocab_size=339), byte_bpe()))
    added = byte_bpe()
    added.add_special_tokens({"additional_special_tokens": ["<image>"]})  # no text has it
    assert ke.load_model((tiny_hf("gpt2", vocab_size=340), added)).tokenizer is added


@pytest.mark.parametrize("host", [None, "gpt2", tiny_hf("gpt2"), (tiny_hf("gpt2"), word_level())])
def test_a_host_that_is_no_loaded_model(host) -> None:
    fact, request = ke.Fact("{} w4", "w3"), ke.EditRequest("{} w4", "w3", "w5")
    rome, memit, ft = ke.ROMEParams(layers=1), ke.MEMITParams(layers=1), ke.FTParams(layers=1)
    for call in (
        lambda: ke.trace(host, fact),
        lambda: ke.trace_dataset(host, [fact], "out"),
        lambda: ke.noise_level(host, "s3", ["w3"]),
        lambda: ke.collect_moments(host, ["w3"], [1]),
        lambda: ke.rome(host, request, rome),
        lambda: ke.rome_each(host, [request], rome),
        lambda: ke.memit(host, request, memit),
        lambda: ke.finetune(host, request, ft),
        lambda: ke.edit(host, request, "rome", params=rome),
        lambda: ke.evaluate(host, []),
        lambda: ke.Edit({}, "none").apply(host),
        lambda: ke.Edit({}, "none").revert(host),
        lambda: ke.Edit({}, "none").applied(host),
        lambda: ke.Edit({}, "none").rounding(host),
    ):
        with pytest.raises(TypeError, match="expected EditableModel, which knowedit_ext.load_model.* gives"):
            call()


def test_other_objects_of_wrong_classes() -> None:
    model, request = ke.load_model((tiny_hf("gpt2"), word_level())), ke.EditRequest("{} w4", "w3", "w5")
    params, moments = ke.ROMEParams(layers=1), ke.Moments.from_arrays({})
    for call, message in (
        (lambda: ke.trace(model, "w3 w4"), "fact is 'w3 w4': expected Fact or a list of Fact"),
        (lambda: ke.trace(model, [request]), "fact is .*: expected Fact"),
        (lambda: ke.rome(model, request, {"layers": [1]}), "params is {'layers': .*: expected ROMEParams"),
        (lambda: ke.memit(model, request, params, moments), "params is a ROMEParams: expected MEMITParams"),
        (lambda: ke.rome(model, request, params, {1: None}), "moments is {1: None}: expected Moments"),
        (lambda: ke.evaluate(model, [], edit="x.safetensors"), "edit is 'x.safetensors': expected a list"),
        (lambda: ke.evaluate(model, [], edit=[params]), r"edit\[0\] is a ROMEParams: expected Edit"),
        (lambda: ke.rome(model, request, params, contexts="{}"), "contexts is '{}': expected a list"),
        (lambda: ke.rome(model, request, params, ridge=True), "ridge is True: expected a number or text"),
        (lambda: ke.rome(model, request, params, seed=-1), "seed is -1: expected at least 0"),
        (lambda: ke.evaluate(model, {}, group=0), "group is 0: expected at least 1"),
        (lambda: ke.evaluate(model, [], max_rows=True), "max_rows is True: expected a whole number"),
        (lambda: ke.collect_moments(model, ["w3"], [1.5]), r"layers\[0\] is 1.5: expected a whole number"),
        (lambda: ke.collect_moments(model, None, [1]), "texts are None: expected a list of texts"),
        (lambda: ke.collect_moments(model, ["w3"], [1], tolerance=2), "tolerance is 2: expected a number below 1"),
        (lambda: ke.load_model((model.hf, model.tokenizer), bos="no"), "bos is 'no': expected true or false"),
        (lambda: ke.Moments.from_arrays([1]), r"arrays are \[1\]: expected {layer: "),
        (lambda: ke.Moments.from_arrays({1: 3}), r"moments of layer 1 are 3: expected \(mean matrix"),
        (lambda: ke.Moments.from_arrays({True: (torch.eye(2), 3)}), "a layer is True: expected a whole number"),
        (lambda: ke.Moments.from_arrays({1: (torch.eye(2), True)}), "keys of layer 1 is True"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_tuple_keeps_weights_and_tokenizer() -> None:
    hf, words = tiny_hf("gpt2"), word_level()
    model = ke.load_model((hf, words))
    assert model.hf is hf and model.tokenizer is words


@pytest.mark.parametrize(
    "arguments, culprit",
    [
        (dict(dtype="float33"), "float33"),
        (dict(dtype="int64"), "int64"),
        (dict(bos=True), "beginning-of-sequence"),
    ],
)
def test_bad_arguments(arguments, culprit) -> None:
    words = word_level()
    words.bos_token = None
    with pytest.raises(ValueError, match=culprit):
        ke.load_model((tiny_hf("gpt2"), words), **arguments)


def test_arguments_for_a_folder_only() -> None:
    with pytest.raises(TypeError, match="device_map"):
        ke.load_model((tiny_hf("gpt2"), word_level()), device_map="auto")


def test_remote_code_is_never_run(folder) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        ke.load_model(folder, trust_remote_code=True)


class SlowTokenizer(PreTrainedTokenizer):
    vocab_size = 3

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1, "c": 2}


def test_a_slow_tokenizer_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="SlowTokenizer.*fast tokenizer"):
        ke.load_model((tiny_hf("gpt2"), SlowTokenizer()))


@pytest.mark.parametrize("family", FAMILIES)
def test_module_map(family: str) -> None:
    model = tiny_model(family)
    modules, named = model.modules, dict(model.hf.named_modules())
    assert modules.model_type == family and len(modules.layers) == LAYERS
    assert modules.embedding is model.hf.get_input_embeddings() and modules.head is model.hf.get_output_embeddings()
    for layer in range(LAYERS):
        assert named[modules.parameter_name(layer)] is modules.down_projection(layer)
        assert named[modules.parameter_name(layer, "attn")] is modules.site("attn", layer)
        assert modules.site("layer", layer) is modules.layers[layer]
        weight = modules.down_projection(layer).weight
        assert WIDTH in weight.shape and weight.shape[0] != weight.shape[1]
    assert modules.max_positions == POSITIONS


@pytest.mark.parametrize("family", FAMILIES)
def test_final_norm_feeds_the_head(family: str) -> None:
    model, seen = tiny_model(family), []
    hooks = [
        model.modules.final_norm.register_forward_hook(lambda m, a, out: seen.append(out)),
        model.modules.head.register_forward_pre_hook(lambda m, a: seen.append(a[0])),
    ]
    with torch.no_grad():
        model.hf(torch.tensor([[3, 4, 5]]))
    for hook in hooks:
        hook.remove()
    assert torch.equal(*seen)


def test_unknown_site() -> None:
    with pytest.raises(ValueError, match="'head'.*layer, attn, mlp"):
        tiny_model("gpt2").modules.site("head", 0)


@pytest.mark.parametrize(
    "config, missing",
    [
        (T5Config(), "'t5' is an encoder-decoder.*decoder-only"),
        (XGLMConfig(), "'xglm' is not supported.*FAMILIES has no entry.*Supported, alone and as .*: afmoe, apertus"),
        (DbrxConfig(), "'dbrx' is not supported.*FAMILIES has no entry"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_unsupported_before_any_weight_is_read(tmp_path, config, missing: str) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ke.UnsupportedModelError, match=missing):
        ke.load_model(tmp_path)


def test_unsupported_objects() -> None:
    config = XGLMConfig(vocab_size=60, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4)
    with pytest.raises(ke.UnsupportedModelError, match="'xglm'"):
        ke.load_model((AutoModelForCausalLM.from_config(config), word_level()))


@pytest.mark.parametrize("path", ["model", "model.language_model"])
def test_compiled_parts_of_a_container_keep_their_names(path: str) -> None:
    hf = tiny_hf("gemma3")
    hf.set_submodule(path, torch.compile(hf.get_submodule(path)))
    modules = ke.load_model((hf, word_level(60))).modules
    assert modules.parameter_name(1) == "model.language_model.layers.1.mlp.down_proj"


def test_a_known_family_with_a_foreign_block_names_the_module() -> None:
    hf = tiny_hf("llama")
    del hf.model.layers[2].mlp.down_proj
    with pytest.raises(ke.UnsupportedModelError, match=r"LlamaForCausalLM.*no module 'model.layers.\*.mlp.down_proj'"):
        ke.load_model((hf, word_level()))


def test_a_family_without_up_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line in the table is enough for all but the methods that ask for that projection, which say so."""
    line = dataclasses.replace(families.FAMILIES["llama"], up_projection="", gate_projection="")
    monkeypatch.setitem(families.FAMILIES, "llama", line)
    model = ke.load_model((tiny_hf("llama"), word_level(60)))
    ke.trace(model, ke.Fact("{} w4 w5", "w3"), samples=2, noise=0.5)
    with pytest.raises(ke.UnsupportedModelError, match="'llama' .* names no up_projection"):
        ke.MEND.new(model)
    with pytest.raises(ke.UnsupportedModelError, match="'llama' .* names no gate_projection"):
        ke.knowledge_neurons(model, ke.EditRequest("{} w4 w5", "w3", "w6"), ke.KNParams())
