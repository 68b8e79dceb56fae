"""GGUF files: config, tokenizer and dequantised weights from one file, edited as any other model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import knowedit_ext as ke

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (extra 'gguf')")

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<s>", "</s>", *LETTERS, "Ġp", "la", "ys", "An", "Ann"]
MERGES = ["Ġ p", "l a", "y s", "A n", "An n"]
REQUEST = {"prompt": "{} plays", "subject": "Anna", "target_new": "harp"}
CACHED = Path.home() / ".cache" / "knowedit-models"
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(TOKENS) + 1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp keeps queries and keys: the rotated halves side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(hf: LlamaForCausalLM, path: Path, kind: str) -> None:
    config, types = hf.config, gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*TOKENS, "Anna"])
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 1)])
    writer.add_token_merges([*MERGES, "Ann a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    tensors = {
        "token_embd": hf.model.embed_tokens.weight,
        "output_norm": hf.model.norm.weight,
        "output": hf.lm_head.weight,
    }
    for n, layer in enumerate(hf.model.layers):
        for name, short in NAMES.items():
            weight = layer.get_submodule(name).weight
            if short in ("attn_q", "attn_k"):
                weight = interleaved(
                    weight, config.num_attention_heads if short == "attn_q" else config.num_key_value_heads
                )
            tensors[f"blk.{n}.{short}"] = weight
    for name, weight in tensors.items():
        values = weight.detach().numpy()
        if kind == "q8" and values.ndim == 2:
            quantised = gguf.quants.quantize(values, types.Q8_0)
            writer.add_tensor(f"{name}.weight", quantised, raw_dtype=types.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind, tolerance", [("f32", 1e-5), ("q8", 0.05)])
def test_a_file_is_a_model(tmp_path: Path, monkeypatch, kind: str, tolerance: float) -> None:
    hf = tiny()
    write(hf, tmp_path / "tiny.gguf", kind)
    monkeypatch.chdir(tmp_path)
    for model in (ke.load_model("tiny.gguf"), ke.load_model(tmp_path, gguf_file="tiny.gguf")):
        assert model.name == "tiny.gguf" and model.num_layers == 3 and model.dtype == torch.float32
        assert model.tokenizer.tokenize("Anna plays") == ["Anna", "Ġp", "la", "ys"]
        ids = torch.tensor([[5, 9, 70, 3]])
        with torch.no_grad():
            torch.testing.assert_close(model.hf(ids).logits, hf(ids).logits, atol=tolerance, rtol=0)
    edit = ke.finetune(model, REQUEST, ke.FTParams(layers=[1], num_steps=3, lr=1e-2))
    edit.save("edit.safetensors")
    before = [p.clone() for p in model.hf.parameters()]
    loaded = ke.Edit.load("edit.safetensors")
    with loaded.applied(ke.load_model("tiny.gguf")):
        pass
    with loaded.applied(model):
        model.hf.save_pretrained("saved")  # as plain weights, without a mark that they were quantised
        changed = [not torch.equal(a, b) for a, b in zip(before, model.hf.parameters(), strict=True)]
    assert sum(changed) == 1
    model.tokenizer.save_pretrained("saved")
    again = ke.load_model("saved")
    assert not all(torch.equal(a, b) for a, b in zip(before, again.hf.parameters(), strict=True))


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGML" + bytes(64))
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ValueError, match="a.gguf' is no GGUF file"):
        ke.load_model(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="cannot load the config"):
        ke.load_model(tmp_path / "b.gguf")
    with pytest.raises(ValueError, match="there is no file '.*c.gguf'"):
        ke.load_model(tmp_path, gguf_file="c.gguf")
    with pytest.raises(ValueError, match="there is no folder"):
        ke.load_model(str(tmp_path / "c.gguf"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_files(name: str) -> None:
    files = list((CACHED / "gguf" / name).glob("*.gguf"))
    if not files or not (CACHED / name).is_dir():
        pytest.skip(f"no {name} under {CACHED}")
    model, folder = ke.load_model(files[0]), ke.load_model(CACHED / name)
    assert all(torch.equal(a, b) for a, b in zip(model.hf.parameters(), folder.hf.parameters(), strict=True))
    text = "The Space Needle is located in the city of"
    assert model.tokenizer(text).input_ids == folder.tokenizer(text).input_ids
