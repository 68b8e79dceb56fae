"""How much each head looks from a prompt's last token at the subject, and how much it takes from there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..model.facts import Fact, tokenize_fact
from ..model.families import UnsupportedModelError
from ..model.hooks import Hooks, at_rest
from ..model.load import EditableModel
from ..sweep.attention import layer_in_progress
from ..sweep.capture import clean_runs
from ..sweep.packed import PackedPrompts

MEASURES = ("attention", "value_norm")


@at_rest
def head_attention(model: EditableModel, facts: Sequence[Fact]) -> np.ndarray:
    """[facts, 2, layers, heads] float32: from the last token of each prompt to its subject's last token j, the
    attention a_j, and |a_j v_j W_O|: what the head adds to the attention's output from there, before a norm behind it.
    """
    tokenized = [tokenize_fact(model, fact) for fact in facts]
    packed = PackedPrompts(model, clean_runs(model, [each.ids for each in tokenized]))
    seen = torch.tensor([packed.row(n, t.subject_range[1] - 1) for n, t in enumerate(tokenized)])
    last = torch.tensor([packed.row(n, len(t.ids) - 1) for n, t in enumerate(tokenized)])
    spans = [range(packed.row(n, 0), packed.row(n, len(t.ids) - 1) + 1) for n, t in enumerate(tokenized)]
    measured: list[torch.Tensor] = []
    outputs: dict[int, nn.Module] = {}

    def note_output(layer: int, module: nn.Module, *_: Any) -> None:
        if layer_in_progress().recorded is not None:  # what is called behind the attention function
            outputs.setdefault(layer, module)

    def read(layer: int, _: torch.Tensor) -> None:
        attending = layer_in_progress()
        if attending.queries is None:
            name = type(model.modules.attn(layer)).__name__
            raise UnsupportedModelError(f"{name} has no plain softmax over heads whose weights could be read")
        measured.append(_measure(attending, outputs[layer], spans, seen, last))

    with Hooks() as hooks:
        for layer in range(model.num_layers):
            attention = model.modules.attn(layer)
            for part in attention.modules():
                if part is not attention and not list(part.children()) and getattr(part, "weight", None) is not None:
                    hooks.before(part, partial(note_output, layer, part))
            hooks.behind(attention, partial(read, layer))
        packed.run(packed.start, 0, model.num_layers)
    return torch.stack(measured, dim=2).float().cpu().numpy()


def _measure(
    attending: Any, output: nn.Module, spans: Sequence[range], seen: torch.Tensor, last: torch.Tensor
) -> torch.Tensor:
    """[facts, 2, heads] of one layer."""
    (keys, values), (queries, scale, window, softcap, bias) = attending.recorded, attending.queries
    heads = queries.shape[1]
    shared = heads // keys.shape[1]  # query heads of a key's head
    k, v = (x.repeat_interleave(shared, dim=1).float() for x in (keys, values))
    found = []
    for span, at, end in zip(spans, seen.tolist(), last.tolist(), strict=True):
        first = max(span.start, end - window + 1) if window else span.start
        scores = scale * torch.einsum("hd,rhd->hr", queries[end].float(), k[first : end + 1])
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[:, first - span.start : end + 1 - span.start]
        weight = scores.softmax(-1)[:, at - first] if at >= first else scores.new_zeros(heads)
        taken = (weight[:, None] * v[at]).to(values.dtype)  # [heads, d of values]
        alone = torch.zeros(heads + 1, heads, taken.shape[1], dtype=taken.dtype, device=taken.device)
        alone[torch.arange(heads), torch.arange(heads)] = taken  # each head by itself; none, which leaves the bias
        added = output(alone.reshape(1, heads + 1, -1))[0].float()
        found.append(torch.stack([weight, (added[:-1] - added[-1]).norm(dim=-1)]))
    return torch.stack(found)
