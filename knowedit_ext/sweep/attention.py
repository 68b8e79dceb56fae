"""Runs a Hugging Face attention module on packed rows: only the attention function is swapped.

Classes that look their function up in transformers' `AttentionInterface` get ours by name; those whose forward calls
their own `_attn` (GPT-Neo; GPT-J before transformers 5.24) have it wrapped; a few that compute scores themselves are
known to `own_scores`; all others run whole sequences, see `whole`. Which a class does is read from its forward. All
read what the layer in progress attends by from a context variable.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface

from ..model.activations import fused_gelu
from ..model.families import ModuleMap, UnsupportedModelError
from ..model.hooks import Stop, named_arguments
from ..ops import tree_attention
from ..ops.reference import compute_dtype
from .own_scores import Forward, around_scores
from .whole import mix_whole, runs_whole

NAME = "knowedit_tree"


@dataclass
class Attending:
    """The layer in progress: its table (int32 [n, 5], see `tree_attention`) and keys and values of frozen rows.

    segments: None where only keys and values are wanted: the layer is stopped (`Stop`) when they are there.
    frozen: (k, v), [frozen rows, kv_heads, d] each, in front of the layer's own; or what a module that runs whole
    sequences reads there. recorded: filled with the layer's own.
    queries: its own [rows, heads, d], with scale, sliding window and softcap (0: none), and what is added to scores by
    key position [heads, positions] or None; None where that is not all.
    nearest: how far away the nearest key lies for a row that does not see itself: the table has that key in its place.
    sight: (longest prompt, how far the mask lets its tokens see), see `RowArguments.sight`.
    lengths, run_of_row, mixing: of modules that run whole sequences: the prompts' lengths, the prompt of a row, what
    the module gets for each prompt.
    """

    segments: torch.Tensor | None
    frozen: tuple[torch.Tensor, ...] | None = None
    recorded: tuple[torch.Tensor, ...] | None = None
    queries: tuple[torch.Tensor, float, int, float, torch.Tensor | None] | None = None
    nearest: int = 0
    sight: tuple[int, int | None] = (0, None)
    lengths: Sequence[int] = ()
    run_of_row: Callable[[int], int] = lambda row: 0
    mixing: Sequence[Mapping[str, Any]] = ()


_attending: ContextVar[Attending] = ContextVar("knowedit_attending")


def layer_in_progress() -> Attending:
    """For hooks inside of it."""
    return _attending.get()


# Keyword arguments that change nothing here, and the values they may have (None always may): rows are placed by the
# table and by their rotary angles, there is no cache, and what a row sees is causal.
_HARMLESS: dict[str, Callable[[Any], bool]] = {
    "position_ids": lambda value: True,
    "cache_position": lambda value: True,
    "use_cache": lambda value: not value,
    "output_attentions": lambda value: not value,
    "output_router_logits": lambda value: not value,
    "logits_to_keep": lambda value: True,  # of the head
    "is_causal": lambda value: value is True,
    "dropout": lambda value: value == 0,
}


def _attend(
    module: nn.Module,
    query: torch.Tensor,  # [1, heads, rows, d]
    key: torch.Tensor,  # [1, kv_heads, rows, d]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,  # [..., heads, 1, positions]; ours alone, see `own_scores`
    **others: Any,
) -> tuple[torch.Tensor, None]:
    for name, given in (others | {"attention_mask": attention_mask}).items():
        if given is not None and not (name in _HARMLESS and _HARMLESS[name](given)):
            raise UnsupportedModelError(
                f"{type(module).__name__} attends with {name}={_brief(given)}, which the sweep's attention does not "
                "compute: its numbers would be wrong"
            )
    layer = _attending.get()
    if layer.recorded is not None:
        raise UnsupportedModelError(f"{type(module).__name__} attends more than once in a layer: no sweep does that")
    if sliding_window and layer.nearest >= sliding_window:
        raise ValueError(
            f"a token that is not to see itself sees nothing in a sliding window of {sliding_window}: the nearest "
            f"position left to it is {layer.nearest} back"
        )
    if key_bias is not None and layer.nearest:
        raise UnsupportedModelError(
            f"{type(module).__name__} adds to scores by the key's position (ALiBi), so a sweep cannot keep a token "
            "from seeing itself: cut other edges (groups= of a knockout, without the last token)"
        )
    # The gradient of squeeze is a view; that of [0] is filled with zeros and copied.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [rows, heads, d]
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    width = v.shape[-1]
    if width < q.shape[-1]:  # latent attention (DeepSeek): keys are wider than values
        v = nn.functional.pad(v, (0, q.shape[-1] - width))
    sinks, bias = (None if x is None else x.detach().to(q.device, compute_dtype(q.dtype)) for x in (s_aux, key_bias))
    bias = None if bias is None else bias.reshape(q.shape[1], -1)
    layer.recorded = (k, v)
    if s_aux is None and width == q.shape[-1]:
        layer.queries = (q, scale, sliding_window or 0, softcap or 0.0, bias)
    if layer.segments is None:
        raise Stop
    frozen = 0
    if layer.frozen is not None:
        frozen = 0 if any(x.requires_grad for x in layer.frozen) else len(layer.frozen[0])
        k, v = (torch.cat(pair) for pair in zip(layer.frozen, (k, v), strict=True))
    table = layer.segments.to(q.device)
    out = tree_attention(q, k, v, table, scale, sliding_window or 0, softcap or 0.0, sinks, bias, frozen)
    return out[None, ..., :width], None  # [1, rows, heads, d]


def _brief(value: Any) -> str:
    return f"tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _by_interface(
    module: nn.Module, *args: Any, sliding_window: int | None = None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """The mask that the sweep does not hand over must say what the arguments say, for prompts of this very length."""
    length, seen = _attending.get().sight
    ours = min(length, sliding_window or length)
    if seen is not None and seen != ours:
        mask = f"see the last {seen} of {length} positions" if seen else "see what is no sliding window"
        raise UnsupportedModelError(
            f"{type(module).__name__}'s mask lets tokens {mask}, its arguments {ours}: a sweep does not know of masks, "
            "so its numbers would be wrong (whole=True in the family's line has the class attend by itself)"
        )
    return _attend(module, *args, sliding_window=sliding_window, **kwargs)


AttentionInterface.register(NAME, _by_interface)


def _calls_attn(attention: nn.Module) -> bool:
    """Whether the class's own forward calls `self._attn`."""
    return "_attn" in inspect.unwrap(type(attention).forward).__code__.co_names


def _attn_without_interface(module: nn.Module):
    """As GPT-J's and GPT-Neo's `_attn(query, key, value, mask)`: heads first, result [1, heads, rows, d]."""
    scaling = 1.0 / float(getattr(module, "scale_attn", 1.0))
    window = module.config.window_size if getattr(module, "attention_type", None) == "local" else None

    def attend(query, key, value, attention_mask=None, **others):
        out, weights = _attend(module, query, key, value, attention_mask, scaling, window, **others)
        return out.transpose(1, 2), weights

    return attend


def _around_scores(attention: nn.Module, own: Forward, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    def attend(query, key, value, scaling, key_bias):
        out, _ = _attend(attention, query, key, value, None, scaling, key_bias=key_bias)
        return out.flatten(2)

    return own(attention, attend, **named_arguments(attention, args, kwargs))


def _mix(attention: nn.Module, own_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    layer = _attending.get()
    if layer.recorded is not None:
        raise UnsupportedModelError(f"{type(attention).__name__} mixes tokens more than once in a layer")
    return mix_whole(attention, own_forward, layer, args, kwargs)


@contextmanager
def tree_attention_in(modules: ModuleMap) -> Iterator[None]:
    """While open, the model's attention modules attend by the table given to `attending`; then all is as it was.

    Activation functions of many kernels run as one, see `fused_gelu`.
    """
    attentions = [modules.attn(layer) for layer in range(len(modules.layers))]
    wrapped: list[nn.Module] = []
    forwards: list[tuple[nn.Module, Any]] = []
    configs: dict[int, tuple[Any, str]] = {}
    try:
        for attention in attentions:
            whole = modules.family.whole or runs_whole(attention)
            own = None if whole else around_scores(attention)
            if whole or own is not None:
                forwards.append((attention, attention.__dict__.get("forward")))
                inside, parts = (_mix, attention.forward) if whole else (_around_scores, own)
                attention.forward = partial(inside, attention, parts)
            elif _calls_attn(attention) and (hasattr(attention, "scale_attn") or hasattr(attention, "attention_type")):
                attention._attn = _attn_without_interface(attention)
                wrapped.append(attention)
            elif not hasattr(getattr(attention, "config", None), "_attn_implementation"):
                raise _not_taken(attention)
            elif id(attention.config) not in configs:
                configs[id(attention.config)] = (attention.config, attention.config._attn_implementation)
                attention.config._attn_implementation = NAME
        with fused_gelu(*modules.layers):
            yield
    finally:
        for attention in wrapped:
            del attention._attn
        for attention, before in forwards:
            if before is None:
                del attention.forward
            else:
                attention.forward = before
        for config, implementation in configs.values():
            config._attn_implementation = implementation


@contextmanager
def attending(
    attention: nn.Module,
    segments: torch.Tensor | None,
    frozen: tuple[torch.Tensor, ...] | None = None,
    nearest: int = 0,
    **told: Any,
) -> Iterator[Attending]:
    """What the layer that runs inside attends by; holds its keys and values afterwards.

    Raises `UnsupportedModelError` where the layer's `attention` went another way than through the tree.
    """
    layer = Attending(segments, frozen, nearest=nearest, **told)
    token = _attending.set(layer)
    try:
        yield layer
    finally:
        _attending.reset(token)
    if layer.recorded is None:
        raise _not_taken(attention)


def _not_taken(attention: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(attention).__name__} does not attend by transformers' AttentionInterface (transformers "
        f"{transformers.__version__}), so a sweep cannot give it its own; where the class was chosen by the model's "
        'attn_implementation, load it with "eager" or "sdpa"'
    )
