"""Settings of a config that change the arithmetic, flipped one at a time: the trace is the plain loop's, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from packaging.version import Version

import knowedit_ext as ke

from ..support.families import CONFIGS, LAYERS, VOCAB, tiny_hf
from ..support.more_families import DENSE, EXPERTS, known, more_hf
from ..support.oracle import plain_trace
from ..support.tokenizers import word_level
from ..tracing.test_against_the_loop import FACTS, IDS, NOISE, SAMPLES, noisy

pytestmark = pytest.mark.filterwarnings("ignore:corrupting")

YARN = dict(rope_type="yarn", factor=4.0, rope_theta=10000.0, original_max_position_embeddings=4)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    rope_theta=1000.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8,
)
DYNAMIC = dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0)
SETTINGS: list[tuple[str, dict]] = [
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True)),
    ("gpt2", dict(scale_attn_weights=False)),
    ("gpt2", dict(reorder_and_upcast_attn=True)),
    ("gpt2", dict(tie_word_embeddings=False)),
    ("gptj", dict(rotary_dim=8)),
    ("gpt_neox", dict(use_parallel_residual=False)),
    ("gpt_neox", dict(attention_bias=False)),
    ("llama", dict(attention_bias=True, mlp_bias=True)),
    ("llama", dict(rope_parameters=YARN)),
    ("llama", dict(rope_parameters=LLAMA3)),
    ("llama", dict(rope_parameters=DYNAMIC, max_position_embeddings=4)),
    ("llama", dict(tie_word_embeddings=True)),
    ("llama", dict(head_dim=16)),
    ("mistral", dict(sliding_window=None)),
    ("qwen2", dict(use_sliding_window=False)),
    ("qwen3", dict(attention_bias=True, use_sliding_window=True, sliding_window=3, max_window_layers=2)),
    ("gemma2", dict(attn_logit_softcapping=None)),
    ("gemma3_text", dict(use_bidirectional_attention=True)),
    ("gemma3_text", dict(query_pre_attn_scalar=100)),
    ("stablelm", dict(use_parallel_residual=False)),
    ("stablelm", dict(qk_layernorm=False, use_qkv_bias=False)),
    ("phi", dict(qk_layernorm=True)),
    ("phi", dict(num_key_value_heads=4)),
    ("smollm3", dict(use_sliding_window=True, sliding_window=3, layer_types=["sliding_attention"] * LAYERS)),
    ("olmo", dict(clip_qkv=None)),
    ("starcoder2", dict(use_bias=False, sliding_window=None)),
    ("gpt_bigcode", dict(multi_query=False)),
    ("gpt_bigcode", dict(attention_softmax_in_fp32=False, scale_attention_softmax_in_fp32=False)),
    ("gpt_neo", dict(attention_types=[[["local"], LAYERS]])),
    ("opt", dict(do_layer_norm_before=False)),
    ("opt", dict(word_embed_proj_dim=16)),
    ("opt", dict(enable_bias=False)),
    ("opt", dict(_remove_final_layer_norm=True)),
    ("biogpt", dict(scale_embedding=False)),
    ("cohere", dict(use_qk_norm=True)),
    ("cohere2", dict(layer_types=["full_attention"] * LAYERS)),
    ("granite", dict(residual_multiplier=1.0, logits_scaling=8.0)),
    ("hyperclovax", dict(use_post_norm=False)),
    ("seed_oss", dict(attention_out_bias=True)),
    ("persimmon", dict(qk_layernorm=False)),
    ("exaone4", dict(sliding_window=None, layer_types=["full_attention"] * LAYERS)),
    ("glm4", dict(attention_bias=True)),
    ("apertus", dict(qk_norm=False)),
    ("gemma4_text", dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB)),
    ("gemma4_text", dict(num_kv_shared_layers=2)),
    ("gemma4_text", dict(attention_k_eq_v=True)),
    ("gemma4_text", dict(num_kv_shared_layers=1, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB)),
    ("gemma4_text", dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16)),
    ("bloom", dict(apply_residual_connection_post_layernorm=True)),
    ("falcon", dict(alibi=True)),
    ("falcon", dict(parallel_attn=False)),
    ("falcon", dict(multi_query=False)),
    ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)),
    ("falcon", dict(bias=True)),
    ("mpt", dict(attn_config=dict(alibi=False))),
    ("mpt", dict(attn_config=dict(clip_qkv=0.5))),
    ("mpt", dict(attn_config=dict(qk_ln=True))),
    ("mpt", dict(attn_config=dict(softmax_scale=0.2))),
    ("qwen3_5_text", dict(layer_types=["full_attention"] * LAYERS)),
    ("qwen3_5_text", dict(layer_types=["linear_attention"] * LAYERS)),
    ("lfm2", dict(conv_bias=True)),
    ("youtu", dict(q_lora_rank=None)),
    ("deepseek_v2", dict(topk_method="group_limited_greedy", n_group=2)),
    ("deepseek_v3", dict(q_lora_rank=None, rope_interleave=False)),
    ("deepseek_v3", dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.7))),
    ("gpt_oss", dict(sliding_window=None, layer_types=["full_attention"] * LAYERS)),
    ("glm4_moe", dict(use_qk_norm=True)),
    ("qwen2_moe", dict(mlp_only_layers=[0, 2])),
    ("llama4_text", dict(attn_temperature_tuning=True, floor_scale=2, attn_scale=0.5, no_rope_layers=[0, 0, 1, 0])),
    ("llama4_text", dict(attention_chunk_size=4)),
    ("llama4_text", dict(use_qk_norm=False)),
    ("mamba", dict(use_bias=True, use_conv_bias=False)),
]


TESTED = Version("5.24")


@pytest.mark.parametrize(("family", "changed"), SETTINGS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_right_or_refused(family: str, changed: dict) -> None:
    if family not in CONFIGS and not known({family: {}}):
        pytest.skip(f"this transformers has no '{family}'")
    assert family in CONFIGS or family in DENSE or family in EXPERTS
    try:
        hf = tiny_hf(family, **changed) if family in CONFIGS else more_hf(family, **changed)
    except TypeError:
        if Version(transformers.__version__) < TESTED:
            pytest.skip("this transformers cannot build it")
        raise
    try:
        model = ke.load_model((hf, word_level(VOCAB)))
        traces = [ke.trace(model, FACTS[0], samples=SAMPLES, noise=NOISE, **asked) for asked in kinds(model)]
    except (ke.UnsupportedModelError, ValueError) as error:
        assert str(error)
        return
    for trace, asked in zip(traces, kinds(model), strict=True):
        want = plain_trace(hf, IDS[0], noisy(0), trace.answer_ids, **asked)
        np.testing.assert_allclose(trace.scores, want.scores, atol=1e-5, rtol=0)


def kinds(model: ke.EditableModel) -> list[dict]:
    every = [dict(), dict(kind="mlp", window=2), dict(kind="attn", window=2)]
    return [asked for asked in every if asked.get("kind") not in model.modules.family.without]
