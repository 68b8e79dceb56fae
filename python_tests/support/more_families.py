"""Tiny random models of the families whose support is one line, or little more. Scales, windows and caps are off their
neutral values, windows shorter than the tests' prompts."""

from __future__ import annotations

import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

import knowedit_ext as ke
from knowedit_ext.model.pretrained import auto_class

from .families import _CAPPED, _GPT, _PLAIN, _VISION, HEADS, LAYERS, POSITIONS, VOCAB, WIDTH, spread_weights
from .tokenizers import word_level

_HEAD = dict(head_dim=8)
_WINDOW = dict(sliding_window=3)
_HALF = dict(layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2))
_MIXED = dict(layer_types=["linear_attention", "full_attention"] * (LAYERS // 2))
_LINEAR = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=3,
)
_CONV = dict(layer_types=["conv", "full_attention"] * (LAYERS // 2), conv_L_cache=3)
_BLOOM = dict(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS)
_MUP = dict(embedding_multiplier=2.0, attention_multiplier=0.4, residual_multiplier=0.6, logits_scaling=0.5)
_MLA = dict(
    num_key_value_heads=HEADS, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8
)
_MOE = dict(moe_intermediate_size=16, num_experts_per_tok=2)
_ROUTED = dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1)
_LLAMA4 = dict(num_local_experts=2, intermediate_size_mlp=48, interleave_moe_layer_step=2, no_rope_layers=[1, 0, 1, 1])
_MAMBA = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=4, conv_kernel=3)
_SSM = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1)
_SIGLIP = {name: value for name, value in _VISION.items() if name != "image_size"} | dict(num_patches=4)
_QWEN_VISION = dict(depth=1, hidden_size=16, out_hidden_size=WIDTH, num_heads=2)
_MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]))
_GEMMA4 = (
    _PLAIN
    | _HEAD
    | _WINDOW
    | _HALF
    | dict(
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        pad_token_id=0,
        final_logit_softcapping=9.0,
        global_head_dim=8,
    )
)
_E2B = dict(
    hidden_size_per_layer_input=6,
    vocab_size_per_layer_input=VOCAB,
    num_kv_shared_layers=1,
    use_double_wide_mlp=True,
)
_SPARSE = _PLAIN | _HEAD | _MOE | dict(num_experts=4)
_HYBRID_MOE = _PLAIN | _HEAD | _LINEAR | _MIXED | _MOE | dict(num_experts=4, shared_expert_intermediate_size=16)

DENSE: dict[str, dict] = {
    "gemma": _PLAIN | _HEAD,
    "stablelm": _PLAIN
    | dict(use_qkv_bias=True, partial_rotary_factor=0.5, qk_layernorm=True, use_parallel_residual=True),
    "phi": _PLAIN | dict(partial_rotary_factor=0.5),
    "smollm3": _PLAIN | dict(no_rope_layers=[1, 0, 1, 0]),
    "glm": _PLAIN | _HEAD | dict(partial_rotary_factor=0.5),
    "glm4": _PLAIN | _HEAD | dict(partial_rotary_factor=0.5),
    "olmo": _PLAIN | dict(clip_qkv=0.5),
    "olmo3": _PLAIN | _WINDOW | _HALF,
    "starcoder2": _PLAIN | _WINDOW | dict(use_bias=True),
    "gpt_bigcode": _GPT | dict(multi_query=True),
    "codegen": _GPT | dict(rotary_dim=4),
    "gpt_neo": dict(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        max_position_embeddings=POSITIONS,
        attention_types=[[["global", "local"], LAYERS // 2]],
        window_size=3,
    ),
    "opt": _PLAIN | dict(ffn_dim=48, word_embed_proj_dim=WIDTH),
    "biogpt": _PLAIN,
    "nemotron": _PLAIN | _HEAD | dict(partial_rotary_factor=0.5),
    "ministral": _PLAIN | _HEAD | _WINDOW | _HALF,
    "ministral3": _PLAIN | _HEAD,
    "seed_oss": _PLAIN | _HEAD | dict(attention_bias=True),
    "ernie4_5": _PLAIN | _HEAD | dict(use_bias=True),
    "hunyuan_v1_dense": _PLAIN | _HEAD,
    "apertus": _PLAIN,
    "arcee": _PLAIN | _HEAD,
    "helium": _PLAIN | _HEAD,
    "vaultgemma": _PLAIN | _HEAD | _WINDOW | _HALF | _CAPPED | dict(query_pre_attn_scalar=5),
    "internlm3": _PLAIN | _HEAD,
    "persimmon": _PLAIN | dict(partial_rotary_factor=0.5),
    "exaone4": _PLAIN | _WINDOW | _HALF,
    "cwm": _PLAIN | _HEAD | _WINDOW | _HALF,
    "jais2": _PLAIN | _HEAD,
    "nanochat": _PLAIN,
    "youtu": _PLAIN | _MLA,
    "cohere": _PLAIN | dict(logit_scale=0.25),
    "cohere2": _PLAIN | _WINDOW | _HALF | dict(logit_scale=0.25),
    "granite": _PLAIN | _MUP,
    "granite_swa": _PLAIN | _HEAD | _MUP | _WINDOW | _HALF,
    "hyperclovax": _PLAIN | _HEAD | _MUP | dict(use_post_norm=True),
    "minicpm3": _PLAIN | _MLA | dict(scale_emb=2, scale_depth=1.4, dim_model_base=16),
    "mistral3": dict(
        text_config=_PLAIN | _HEAD | _WINDOW | dict(model_type="mistral"),
        vision_config=_VISION | dict(model_type="pixtral"),
    ),
    "qwen2_vl": dict(
        text_config=_PLAIN | _MROPE, vision_config=dict(depth=1, embed_dim=16, hidden_size=WIDTH, num_heads=2)
    ),
    "qwen2_5_vl": dict(
        text_config=_PLAIN | _MROPE, vision_config=dict(depth=1, hidden_size=16, out_hidden_size=WIDTH, num_heads=2)
    ),
    "qwen3_vl": dict(
        text_config=_PLAIN | _HEAD,
        vision_config=_QWEN_VISION | dict(deepstack_visual_indexes=[0]),
    ),
    "llava": dict(
        text_config=_PLAIN | dict(model_type="llama"), vision_config=_VISION | dict(model_type="clip_vision_model")
    ),
    "smolvlm": dict(text_config=_PLAIN | dict(model_type="llama"), vision_config=_VISION),
    "llava_onevision": dict(
        text_config=_PLAIN | dict(model_type="qwen2"), vision_config=_VISION | dict(model_type="siglip_vision_model")
    ),
    "glm4v": dict(
        text_config=_PLAIN | _HEAD | _MROPE,
        vision_config=dict(depth=1, hidden_size=16, num_heads=2, out_hidden_size=WIDTH, intermediate_size=16),
    ),
    "apertus1p5_text": _PLAIN,
    "bamba": _PLAIN | _SSM | dict(attn_layer_indices=[1, 3]),
    "exaone": _PLAIN | _HEAD,
    "iquestcoder": _PLAIN | _HEAD,
    "qwen3_5": dict(text_config=_PLAIN | _HEAD | _LINEAR | _MIXED, vision_config=_QWEN_VISION),
    "gemma4_text": _GEMMA4,
    "gemma4": dict(text_config=_GEMMA4 | _E2B),
    "bloom": _BLOOM,
    "falcon": _PLAIN | dict(new_decoder_architecture=False, multi_query=True, parallel_attn=True),
    "mpt": dict(
        vocab_size=VOCAB, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, max_seq_len=POSITIONS, expansion_ratio=2
    ),
    "qwen3_5_text": _PLAIN | _HEAD | _LINEAR | _MIXED,
    "diffllama": _PLAIN,
    "doge": _PLAIN,
    "bitnet": _PLAIN,
    "olmo_hybrid": _PLAIN | _LINEAR | _MIXED,
    "lfm2": _PLAIN | _CONV,
    "lfm3": _PLAIN | _HEAD | _WINDOW | dict(layer_types=["conv", "full_attention", "sliding_attention", "conv"]),
    "lfm2_vl": dict(
        text_config=_PLAIN | _CONV | dict(model_type="lfm2"),
        vision_config=_SIGLIP | dict(model_type="siglip2_vision_model"),
    ),
    "idefics3": dict(text_config=_PLAIN | dict(model_type="llama"), vision_config=_VISION),
    "internvl": dict(
        text_config=_PLAIN | dict(model_type="qwen2"),
        vision_config=_VISION | dict(model_type="internvl_vision", image_size=[28, 28], patch_size=[14, 14]),
    ),
    "aya_vision": dict(
        text_config=_PLAIN | _WINDOW | _HALF | dict(model_type="cohere2", logit_scale=0.25),
        vision_config=_VISION | dict(model_type="siglip_vision_model"),
    ),
    "cohere2_vision": dict(
        text_config=_PLAIN | _WINDOW | _HALF | dict(model_type="cohere2", logit_scale=0.25),
        vision_config=_VISION | dict(model_type="siglip_vision_model"),
    ),
}
EXPERTS: dict[str, dict] = {
    "mixtral": _PLAIN | _WINDOW | dict(num_local_experts=4),
    "qwen2_moe": _PLAIN | _MOE | dict(num_experts=4, shared_expert_intermediate_size=16),
    "qwen3_moe": _PLAIN | _HEAD | _MOE | dict(num_experts=4, mlp_only_layers=[1]),
    "olmoe": _PLAIN | dict(num_experts=4, num_experts_per_tok=2, clip_qkv=0.5),
    "deepseek_v2": _PLAIN | _MLA | _MOE | _ROUTED,
    "deepseek_v3": _PLAIN | _MLA | _MOE | _ROUTED | dict(n_group=2, routed_scaling_factor=1.5),
    "gpt_oss": _PLAIN | _HEAD | _WINDOW | _HALF | dict(num_local_experts=4, num_experts_per_tok=2),
    "glm4_moe": _PLAIN | _HEAD | _MOE | _ROUTED | dict(partial_rotary_factor=0.5),
    "phimoe": _PLAIN | dict(num_local_experts=4),
    "granitemoe": _PLAIN | _MUP | dict(num_local_experts=4, num_experts_per_tok=2),
    "ernie4_5_moe": _PLAIN | _MOE | dict(moe_num_experts=4, moe_k=2),
    "dots1": _PLAIN | _HEAD | _MOE | _ROUTED | _WINDOW | _HALF,
    "flex_olmo": _PLAIN | dict(num_experts=4, num_experts_per_tok=2),
    "hunyuan_v1_moe": _PLAIN | _HEAD | dict(num_experts=4, moe_topk=2),
    "llama4_text": _PLAIN | _HEAD | _LLAMA4,
    "llama4": dict(text_config=_PLAIN | _HEAD | _LLAMA4, vision_config=_VISION | dict(vision_output_dim=WIDTH)),
    "exaone_moe": _PLAIN
    | _HEAD
    | _MOE
    | _WINDOW
    | _HALF
    | dict(num_experts=4, num_shared_experts=1, n_group=1, topk_group=1),
    "lfm2_moe": _PLAIN
    | _MOE
    | dict(layer_types=["conv", "full_attention"] * (LAYERS // 2), conv_L_cache=3, num_experts=4),
    "qwen3_5_moe_text": _PLAIN
    | _HEAD
    | _LINEAR
    | _MIXED
    | _MOE
    | dict(num_experts=4, shared_expert_intermediate_size=16),
    "qwen3_next": _HYBRID_MOE,
    "afmoe": _SPARSE | _WINDOW | _HALF | dict(num_shared_experts=1, route_scale=1.5),
    "axk1": _PLAIN | _MLA | _MOE | _ROUTED,
    "cohere2_moe": _SPARSE | _WINDOW | dict(num_shared_experts=1, logit_scale=0.25),
    "flint": _SPARSE | _WINDOW | _HALF,
    "glm4_moe_lite": _PLAIN | _MLA | _MOE | _ROUTED,
    "hy_v3": _SPARSE | dict(num_shared_experts=1),
    "kolibri1": _SPARSE | _WINDOW | _HALF,
    "laguna": _SPARSE | _WINDOW | _HALF,
    "mellum": _SPARSE | _WINDOW | _HALF,
    "mimo_v2_flash": _SPARSE | _WINDOW | _HALF | dict(n_routed_experts=4, n_group=1, topk_group=1, v_head_dim=8),
    "minimax": _PLAIN
    | _HEAD
    | dict(num_local_experts=4, num_experts_per_tok=2, layer_types=["linear_attention", "full_attention"] * 2),
    "minimax_m2": _PLAIN | _HEAD | dict(num_local_experts=4, num_experts_per_tok=2),
    "solar_open": _PLAIN | _HEAD | _MOE | _ROUTED,
    "sarvam_moe": _PLAIN | _HEAD | _MOE | _ROUTED,
    "sarvam_mla": _PLAIN | _MLA | _MOE | _ROUTED,
    "granitemoeshared": _PLAIN | _MUP | dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16),
    "granitemoe_swa": _PLAIN
    | _MUP
    | _WINDOW
    | _HALF
    | dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16),
    "jetmoe": _PLAIN | dict(num_local_experts=4, num_experts_per_tok=2, kv_channels=8),
    "qwen3_vl_moe": dict(
        text_config=_SPARSE,
        vision_config=_QWEN_VISION | dict(deepstack_visual_indexes=[0]),
    ),
    "aria_text": _PLAIN | _HEAD | dict(moe_topk=2),
    "lara_mini": _HYBRID_MOE,
    "granitemoehybrid": _PLAIN
    | _MUP
    | _SSM
    | dict(
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
        layer_types=["mamba", "attention"] * (LAYERS // 2),
    ),
    "jamba": _PLAIN
    | dict(
        num_experts=4,
        mamba_d_state=4,
        mamba_dt_rank=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "kimi_linear": _PLAIN
    | _MLA
    | _MOE
    | _ROUTED
    | dict(num_local_experts=4, linear_head_dim=8, linear_num_heads=4, linear_conv_kernel_dim=3)
    | dict(layer_types=["linear_attention", "full_attention"] * (LAYERS // 2)),
    "nemotron_h": _PLAIN
    | _HEAD
    | _MOE
    | _ROUTED
    | dict(mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=4, n_groups=1, moe_shared_expert_intermediate_size=16)
    | dict(conv_kernel=3, layers_block_type=["linear_attention", "mlp", "full_attention", "moe"]),
    "falcon_mamba": _MAMBA | dict(time_step_rank=4),
    "mamba": _MAMBA | dict(time_step_rank=4),
    "mamba2": _MAMBA | dict(num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
}


# Off others': tiny models whose rounding is no longer small, whose experts change at a touch, or that hardly answer.
SCALES = {"youtu": 4.0, "minimax": 6.0, "jetmoe": 16.0, "mamba": 3.0, "falcon_mamba": 4.0}


# Before 5.24 transformers cannot build them from a config, or passes its layers what a sweep refuses.
LATER = "qwen2_vl qwen2_5_vl qwen3_5 llama4 doge nemotron_h gemma4".split()


def known(families: dict[str, dict]) -> list[str]:
    """Those that the installed transformers has."""
    late = Version(transformers.__version__) < Version("5.24")
    return [family for family in families if family in CONFIG_MAPPING and not (late and family in LATER)]


def config(family: str, **overrides) -> PretrainedConfig:
    return CONFIG_MAPPING[family](**((DENSE | EXPERTS)[family] | overrides))


def more_hf(family: str, seed: int = 0, scale: float | None = None, **overrides) -> PreTrainedModel:
    """As `tiny_hf`; norms, biases and sinks are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = config(family, **overrides)
        eager = {"attn_implementation": "eager"} if (DENSE | EXPERTS)[family].get("attn_implementation") else {}
        hf = auto_class(settings).from_config(settings, dtype=torch.float32, **eager).eval()
        with torch.no_grad():
            for name, p in hf.named_parameters():
                if p.dim() == 1 and "A_log" not in name and "dt_bias" not in name:
                    p.add_(0.3 * torch.randn_like(p))
    return spread_weights(hf, scale or SCALES.get(family, 12.0))


def more_model(family: str, **overrides) -> ke.EditableModel:
    return ke.load_model((more_hf(family, **overrides), word_level(VOCAB)))
