"""Tiny random models of every supported family, built offline, with weights large enough that answers differ.

Sliding windows (3) are shorter than the tests' prompts and the soft-caps small enough to bend scores, so both matter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3Config, Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.gptj import GPTJConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.olmo2 import Olmo2Config
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config
from transformers.utils import logging

import knowedit_ext as ke

from .tokenizers import word_level

logging.set_verbosity_error()
logging.disable_progress_bar()

VOCAB, LAYERS, WIDTH, HEADS, POSITIONS = 60, 4, 32, 4, 64
_GPT = dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS)
_LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    max_position_embeddings=POSITIONS,
)
_ENDS = dict(bos_token_id=1, eos_token_id=2)
_PLAIN = _LLAMA | _ENDS | dict(pad_token_id=None)
_GEMMA = _PLAIN | dict(head_dim=8, sliding_window=3, query_pre_attn_scalar=5)  # a scale that is not 1 / sqrt(d)
# The "sdpa" of older transformers takes Gemma2 and leaves its cap out.
_CAPPED = dict(attn_logit_softcapping=1.0, final_logit_softcapping=4.0, attn_implementation="eager")
_QWEN2 = _PLAIN | dict(use_sliding_window=True, sliding_window=3, max_window_layers=1)
_VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)

CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "gpt2": lambda **k: GPT2Config(**(_GPT | _ENDS | k)),
    "gptj": lambda **k: GPTJConfig(**(_GPT | _ENDS | dict(rotary_dim=4) | k)),
    "gpt_neox": lambda **k: GPTNeoXConfig(**({n: v for n, v in _LLAMA.items() if "key_value" not in n} | k)),
    "llama": lambda **k: LlamaConfig(**(_PLAIN | k)),
    "mistral": lambda **k: MistralConfig(**(_PLAIN | dict(sliding_window=3) | k)),
    "qwen2": lambda **k: Qwen2Config(**(_QWEN2 | k)),
    "qwen3": lambda **k: Qwen3Config(**(_PLAIN | dict(head_dim=8) | k)),
    "gemma2": lambda **k: Gemma2Config(**(_GEMMA | _CAPPED | k)),
    "gemma3_text": lambda **k: Gemma3TextConfig(**(_GEMMA | dict(sliding_window_pattern=2) | k)),
    "gemma3": lambda **k: Gemma3Config(
        text_config=CONFIGS["gemma3_text"](**k).to_dict(), vision_config=_VISION, mm_tokens_per_image=4
    ),
    "phi3": lambda **k: Phi3Config(**(_PLAIN | dict(sliding_window=3) | k)),
    "olmo2": lambda **k: Olmo2Config(**(_PLAIN | k)),
}
FAMILIES = sorted(CONFIGS)
WINDOWED = ("mistral", "qwen2", "gemma2", "gemma3_text", "gemma3", "phi3")


def spread_weights(hf: PreTrainedModel, scale: float = 12.0) -> PreTrainedModel:
    """Larger matrices: a tiny model as initialised gives every token the same probability."""
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return hf


def tiny_hf(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A fresh model in float32; equal arguments give equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(CONFIGS[family](**overrides), dtype=torch.float32)
    return spread_weights(hf.eval())


def under_config(hf: PreTrainedModel, **changed) -> PreTrainedModel:
    """A model of the same weights, whose config says something else."""
    other = type(hf)(type(hf.config)(**hf.config.to_dict() | changed)).eval()
    other.load_state_dict(hf.state_dict())
    return other


@cache
def tiny_model(family: str) -> ke.EditableModel:
    """Shared between tests, which leave it as it is; its words are w0 .. w59."""
    return ke.load_model((tiny_hf(family), word_level(VOCAB)))
