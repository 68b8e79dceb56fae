"""Rows born in the MLP of every layer, beside the prompts, with gradients: integrated gradients as one job.

A row that stands at a prompt's last token differs from the clean run from its layer's MLP on, and in nothing else: keys
and values of all tokens before it are the clean ones. So L layers with S rows each cost S L (L + 1) / 2 row-layers
forward and as many backward, which is the floor, and S L more rows behind the last layer. The prompts run with them,
so that each layer's weights are read once for all; where rows are born they get what the attention's projections put
out for the clean ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..model.head import final_states
from ..model.hooks import Hooks
from ..model.load import EditableModel
from ..model.weights import find_weight
from .attention import tree_attention_in
from .capture import CleanRun, RowArguments
from .engine import default_max_rows, free_bytes, row_bytes
from .layer import run_layer
from .packed import PackedPrompts
from .whole import mixes_whole


@dataclass
class Newborn:
    """Of one job. By layer: clean [places, neurons], what the activation function reads in the clean run; patched
    [places, copies, neurons], what it reads instead; moved [places, neurons], zeros that are added in the clean run,
    which is one row for all layers.

    states: behind the final norm [places + layers * places * copies, hidden], the clean ones first; differentiable in
    patched and moved.
    """

    clean: dict[int, torch.Tensor] = field(default_factory=dict)
    patched: dict[int, torch.Tensor] = field(default_factory=dict)
    moved: dict[int, torch.Tensor] = field(default_factory=dict)
    states: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class NewbornRows:
    """Rows at some places of prompts, each place [prompt, position]."""

    def __init__(self, model: EditableModel, prompts: Sequence[CleanRun], places: Sequence[tuple[int, int]]) -> None:
        self.model, self.places = model, list(places)
        self._packed = PackedPrompts(model, prompts)
        self._rows = torch.tensor([self._packed.row(*place) for place in self.places])  # among the prompts'

    def jobs(self, layers: Sequence[int], copies: int) -> list[list[int]]:
        """Layers to run together, so that what the backward pass needs stays within half of the free memory."""
        born = copies * len(self.places)
        most = free_bytes(self.model.device) // 2 // row_bytes(self.model)
        groups: list[list[int]] = [[]]
        kept = 0
        for layer in reversed(layers):
            kept += born * (self.model.num_layers - layer)
            if groups[-1] and (kept > most or born * (len(groups[-1]) + 1) > default_max_rows(self.model)):
                groups.append([])
                kept = born * (self.model.num_layers - layer)
            groups[-1].insert(0, layer)
        return groups

    def run(self, layers: Sequence[int], shares: torch.Tensor) -> Newborn:
        """Rows born in `layers`, ascending, in which the activation function reads shares [copies] of the clean."""
        modules, packed, first, copies = self.model.modules, self._packed, layers[0], len(shares)
        born, arguments = Newborn(), self._arguments(len(layers), copies)
        with torch.no_grad():
            hidden = packed.run(packed.start, 0, first)
        hidden = torch.cat([hidden, hidden[self._rows.to(hidden.device)]])
        with tree_attention_in(modules), torch.enable_grad():
            for number in range(first, self.model.num_layers):
                with Hooks() as hooks:
                    if number in layers:
                        hidden = torch.cat([hidden, self._copies(hidden, copies)])
                        self._bear(hooks, number, shares, born, len(hidden))
                    hidden, _ = run_layer(modules, number, hidden, arguments, self._segments(len(hidden), copies))
            born.states = final_states(self.model, hidden[packed.rows :])
        return born

    def _copies(self, x: torch.Tensor, copies: int) -> torch.Tensor:
        """Of all rows those at the places, as they are."""
        return x.detach()[self._rows.to(x.device)].repeat_interleave(copies, 0)

    def _bear(self, hooks: Hooks, layer: int, shares: torch.Tensor, born: Newborn, rows: int) -> None:
        """Hooks under which the last of `rows` are born in a layer."""
        modules, copies, neurons = self.model.modules, len(shares), neurons_of(self.model, layer)
        older = rows - copies * len(self.places)

        def attended(out: torch.Tensor) -> torch.Tensor:
            out = out.squeeze(0)
            return torch.cat([out, self._copies(out, copies)])[None]

        def read(out: torch.Tensor) -> torch.Tensor:
            out = out.squeeze(0)
            clean = out.detach()[self._rows.to(out.device), :neurons]
            patched = (clean.float()[:, None] * shares.to(out.device)[:, None]).to(out.dtype).requires_grad_()
            moved = torch.zeros_like(clean, requires_grad=True)
            born.clean[layer], born.patched[layer], born.moved[layer] = clean, patched, moved
            others = self._copies(
                out[:, neurons:], copies
            )  # what else the projection puts out: a gated MLP's other half
            return _Overwritten.apply(out, moved, patched.flatten(0, 1), others, self._packed.rows)[None]

        if not mixes_whole(modules):
            for module in modules.attn(layer).modules():
                if not list(module.children()) and list(module.parameters()):
                    _put(hooks, module, rows, older, attended)
        _put(hooks, modules.gate_projection(layer), rows, older, read)

    def _arguments(self, layers: int, copies: int) -> RowArguments:
        every = torch.arange(self._packed.rows)
        own = every[self._rows]
        index = torch.cat([every, own, own.repeat_interleave(copies).repeat(layers)])
        return RowArguments(self._packed.prompts, index, self._packed.inputs, index)

    def _segments(self, rows: int, copies: int) -> torch.Tensor:
        """A line for each prompt, and one for each other row: its lone token behind that prompt."""
        packed, count = self._packed, len(self.places)
        prompts = [(packed.row(n, 0), packed.row(n, 0), 0, len(run.ids), -1) for n, run in enumerate(packed.prompts)]
        layers = (rows - packed.rows - count) // (count * copies)
        others = self.places + [place for place in self.places for _ in range(copies)] * layers
        own = [(n, n, position, 1, prompt) for n, (prompt, position) in enumerate(others, packed.rows)]
        return torch.tensor(prompts + own, dtype=torch.int32)


def _put(hooks: Hooks, module: nn.Module, rows: int, older: int, whole: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A module that is given packed rows computes the first `older` of them; whole: from their output to all rows'."""
    cut = False

    def without(module: nn.Module, args: tuple) -> tuple | None:
        nonlocal cut
        cut = len(args) == 1 and args[0].dim() < 4 and args[0].shape[-2] == rows == args[0].shape[:-1].numel()
        return (args[0][..., :older, :],) if cut else None

    hooks.callback(module.register_forward_pre_hook(without).remove)
    hooks.behind(module, lambda out: whole(out) if cut else None)


class _Overwritten(torch.autograd.Function):
    """To rows [older, width] others are added that begin with `new` [born, neurons]; behind the first `start` rows
    `moved` is added. In one copy, whose gradients are views (torch's own fill and copy the whole for each slice)."""

    @staticmethod
    def forward(
        ctx: Any, out: torch.Tensor, moved: torch.Tensor, new: torch.Tensor, others: torch.Tensor, start: int
    ) -> torch.Tensor:
        ctx.start, ctx.moved, ctx.born = start, moved.shape, len(new)
        whole = torch.cat([out, torch.cat([new, others], 1) if others.shape[1] else new])
        whole[start : start + len(moved), : moved.shape[1]] += moved
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count, neurons = ctx.moved
        moved, new = grad[ctx.start : ctx.start + count, :neurons], grad[-ctx.born :, :neurons]
        return grad[: -ctx.born], moved, new, None, None


def neurons_of(model: EditableModel, layer: int) -> int:
    """What the down projection reads."""
    weight = find_weight(model.hf, f"{model.modules.parameter_name(layer)}.weight")
    return weight.shape[0 if weight.input_first else 1]
