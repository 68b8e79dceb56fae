"""What was in transformers.modeling_attn_mask_utils up to transformers 5.5, as far as EasyEdit's UnKE uses it."""

from __future__ import annotations

import torch

__all__ = ["AttentionMaskConverter", "_prepare_4d_causal_attention_mask"]


class AttentionMaskConverter:
    """Additive attention masks of causal models."""

    @staticmethod
    def _unmask_unattended(mask: torch.Tensor, min_dtype: float) -> torch.Tensor:
        """Rows [.., queries, keys] that see nothing see everything: a softmax over nothing is no number."""
        return mask.mul(~torch.all(mask == min_dtype, dim=-1, keepdim=True))


def _prepare_4d_causal_attention_mask(
    attention_mask: torch.Tensor | None,
    input_shape: tuple[int, int],
    inputs_embeds: torch.Tensor,
    past_key_values_length: int,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """[batch, 1, queries, keys]: 0 where a query sees a key, the dtype's lowest number elsewhere.

    attention_mask: [batch, keys], 1 at tokens; None: all are.
    """
    batch, queries = input_shape
    keys = queries + past_key_values_length
    at = torch.arange(past_key_values_length, keys, device=inputs_embeds.device)[:, None]
    key = torch.arange(keys, device=inputs_embeds.device)[None, :]
    seen = key <= at
    if sliding_window is not None:
        seen &= key > at - sliding_window
    seen = seen[None, None].expand(batch, 1, queries, keys)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :].bool()
    lowest = torch.finfo(inputs_embeds.dtype).min
    return torch.where(seen, 0.0, lowest).to(inputs_embeds.dtype)
