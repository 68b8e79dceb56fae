"""Attention classes that compute their scores themselves (Bloom, Falcon, MPT), around the tree attention.

Their forward has no seam between projections and scores, so what they do besides is said again here, in the class's own
parts: how rows become queries, keys and values, how scores are scaled and shifted, where the result goes. `probe` holds
every loaded model to its class's own numbers. The key is the module that a class is written in: code that came with a
checkpoint does as it likes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..ops.reference import compute_dtype

# (query, key, value, scale, bias) -> [1, rows, heads * d]; the first three [1, heads, rows, d], the bias what the model
# passes: [..., heads, 1, positions], or None
Attend = Callable[..., torch.Tensor]
Forward = Callable[..., tuple[torch.Tensor, None]]


def _bloom(
    module: nn.Module, attend: Attend, hidden_states: torch.Tensor, residual: torch.Tensor, alibi: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    qkv = module._reshape(module.query_key_value(hidden_states))
    return residual + module.dense(attend(*qkv, module.inv_norm_factor, alibi)), None


def _falcon(
    module: nn.Module,
    attend: Attend,
    hidden_states: torch.Tensor,
    alibi: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    q, k, v = (x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden_states)))
    scale = module.inv_norm_factor
    if alibi is None:
        q, k = sys.modules[type(module).__module__].apply_rotary_pos_emb(q, k, *position_embeddings)
    else:
        alibi = alibi.to(compute_dtype(alibi.dtype)) * scale  # scaled as the scores are
    return module.dense(attend(q, k, v, scale, alibi)), None


def _mpt(
    module: nn.Module, attend: Attend, hidden_states: torch.Tensor, position_bias: torch.Tensor | None, **_: Any
) -> tuple[torch.Tensor, None]:
    qkv = module.Wqkv(hidden_states)
    if module.clip_qkv:
        qkv = qkv.clamp(-module.clip_qkv, module.clip_qkv)
    q, k, v = (x.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    return module.out_proj(attend(q, k, v, module.softmax_scale, position_bias)), None


_CLASSES: dict[str, Forward] = {
    f"transformers.models.{name}.modeling_{name}": forward
    for name, forward in (("bloom", _bloom), ("falcon", _falcon), ("mpt", _mpt))
}


def around_scores(attention: nn.Module) -> Forward | None:
    """What stands for the class's forward: (module, attend, everything the model passes by name); None for others."""
    own = _CLASSES.get(type(attention).__module__)
    # Only under "sdpa" does every version add ALiBi once: with the mask, and not again to the scores.
    twice = own is _falcon and attention.config.alibi and attention.config._attn_implementation != "sdpa"
    return None if twice else own
