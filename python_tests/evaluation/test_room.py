"""A cache with room: the same logits to the bit as transformers' own, and no copy of what is there for a token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from knowedit_ext.evaluation.generation import _Writer
from knowedit_ext.evaluation.room import _Roomy, _RoomyWindow, make_room

from ..support.families import FAMILIES, VOCAB, tiny_model
from ..support.more_families import known, more_model

Forward = Callable[[torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, Any]]
PROMPT, TOKENS = 6, 8  # windows are of 3


class Copied(TorchDispatchMode):
    """Numbers of the largest tensor that was put together."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.most = max(self.most, out.numel())
        return out


def start(family: str) -> tuple[Forward, torch.Tensor, torch.Tensor]:
    """What goes on with a batch of texts, the texts, and their mask, with padding on the left."""
    model = tiny_model(family) if family in FAMILIES else more_model(family)
    ids = torch.randint(3, VOCAB, (4, PROMPT + TOKENS), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(PROMPT + TOKENS) >= torch.tensor([0, 2, 1, 3])[:, None]).long()
    writer = _Writer(model, PROMPT + TOKENS, 1, None, None)
    return partial(writer._forward, []), ids, mask


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, *known({"bloom": 0, "mpt": 0, "gpt_oss": 0})])  # distances, sinks
def test_the_same_logits_to_the_bit(family: str) -> None:
    forward, ids, mask = start(family)
    _, plain = forward(ids[:, :PROMPT], mask[:, :PROMPT], None)
    roomy = copy.deepcopy(plain)
    make_room(roomy, TOKENS)
    assert all(isinstance(layer, _Roomy) for layer in roomy.layers)
    for at in range(PROMPT, PROMPT + TOKENS):
        wanted, got = (forward(ids[:, at : at + 1], mask[:, : at + 1], cache)[0] for cache in (plain, roomy))
        assert torch.equal(got, wanted)
        if at == PROMPT + 3:  # some texts have ended
            kept = torch.tensor([0, 3])
            ids, mask = ids[kept], mask[kept]
            plain.batch_select_indices(kept)
            roomy.batch_select_indices(kept)
    for one, other in zip(roomy.layers, plain.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        assert one.get_seq_length() == other.get_seq_length() and one.get_mask_sizes(1) == other.get_mask_sizes(1)


@torch.no_grad()
def test_nothing_is_copied_for_a_token() -> None:
    forward, ids, mask = start("gpt2")
    _, cache = forward(ids[:, :PROMPT], mask[:, :PROMPT], None)
    held = cache.layers[0].keys.numel()
    for roomy in (False, True):
        if roomy:
            make_room(cache, TOKENS)
        at = cache.get_seq_length()
        with Copied() as copied:
            forward(ids[:, at : at + 1], mask[:, : at + 1], cache)
        assert (copied.most < held) == roomy


@torch.no_grad()
def test_windows_are_kept_as_windows() -> None:
    forward, ids, mask = start("gemma2")
    _, cache = forward(ids[:, :PROMPT], mask[:, :PROMPT], None)
    make_room(cache, TOKENS)
    assert {type(layer) for layer in cache.layers} == {_Roomy, _RoomyWindow}


def test_other_caches_stay_as_they_are() -> None:
    make_room(None, 3)
    cache = type("Cache", (), {"layers": [layer := object()]})()
    make_room(cache, 3)
    assert cache.layers == [layer]
