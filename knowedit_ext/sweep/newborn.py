"""Rows born in the MLP of every layer, over frozen prompts, with gradients: integrated gradients as one job.

A row that stands at a prompt's last token differs from the clean run from its layer's MLP on, and in nothing else: keys
and values of all tokens before it are the clean ones. So L layers with S rows each cost S L (L + 1) / 2 row-layers
forward and as many backward, which is the floor, and S L more rows behind the last layer; each layer's weights are read
once for all of them. The clean row itself is one for all layers. (A layer runs its attention for newborn rows too,
whose result is the clean one: the blocks of all families stay the model's own.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from ..model.head import final_states
from ..model.hooks import Hooks
from ..model.load import EditableModel
from ..model.weights import find_weight
from .attention import tree_attention_in
from .capture import CleanRun, RowArguments
from .engine import default_max_rows, free_bytes, row_bytes
from .layer import KeysValues, run_layer
from .packed import PackedPrompts


class NewbornRows:
    """Rows at some places of prompts, each place [prompt, position].

    neurons: by layer [places, neurons], what the activation function reads there in the clean run (of gated MLPs: the
    gate projection's output); states: [places, hidden] behind the final norm, clean.
    """

    def __init__(self, model: EditableModel, prompts: Sequence[CleanRun], places: Sequence[tuple[int, int]]) -> None:
        self.model, self.places = model, list(places)
        self._packed = PackedPrompts(model, prompts)
        self._keys_values: dict[int, KeysValues] = {}
        self._entering: list[torch.Tensor] = []  # by layer [places, hidden]
        self.neurons: list[torch.Tensor] = []
        self._widths: list[int] = []  # of what the projections put out, of which neurons may be a part
        self._clean_run()

    @torch.no_grad()
    def _clean_run(self) -> None:
        model, packed = self.model, self._packed
        rows = torch.tensor([packed.row(*place) for place in self.places])

        def record(width: int, out: torch.Tensor) -> None:
            self.neurons.append(out[0, rows.to(out.device), :width].clone())
            self._widths.append(out.shape[-1])

        hidden = packed.start
        with Hooks() as hooks:
            for layer in range(model.num_layers):
                hooks.behind(model.modules.gate_projection(layer), partial(record, neurons_of(model, layer)))
            for layer in range(model.num_layers):
                self._entering.append(hidden[rows.to(hidden.device)])
                hidden = packed.run(hidden, layer, layer + 1, self._keys_values)
        self.states = final_states(model, hidden[rows.to(hidden.device)])

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

    def run(self, patched: dict[int, torch.Tensor], moved: dict[int, torch.Tensor]) -> torch.Tensor:
        """patched: by layer, ascending, [places, copies, neurons], what the activation function is to read instead.
        moved: of the same layers [places, neurons], what is added to it in the clean run, which is one row for all.

        States behind the final norm [places + layers * places * copies, hidden]; differentiable in both.
        """
        modules, first = self.model.modules, next(iter(patched))
        clean, copies = len(self.places), patched[first].shape[1]
        arguments = self._arguments(len(patched), copies)
        hidden = self._entering[first]
        with tree_attention_in(modules), torch.enable_grad():
            for number in range(first, self.model.num_layers):
                with Hooks() as hooks:
                    if number in patched:
                        newborn = self._entering[number].repeat_interleave(copies, 0)
                        hidden = torch.cat([hidden, newborn.to(hidden.device)])
                        new = patched[number].flatten(0, 1)
                        computed = self._widths[number] > new.shape[1]
                        _overwrite(hooks, modules.gate_projection(number), new, moved[number], computed)
                    segments = self._segments((len(hidden) - clean) // (clean * copies), copies)
                    hidden, _ = run_layer(modules, number, hidden, arguments, segments, self._keys_values[number])
            return final_states(self.model, hidden)

    def _arguments(self, layers: int, copies: int) -> RowArguments:
        index = torch.tensor([int(self._packed.offsets[prompt]) + position for prompt, position in self.places])
        return RowArguments(self._packed.prompts, torch.cat([index, index.repeat_interleave(copies).repeat(layers)]))

    def _segments(self, layers: int, copies: int) -> torch.Tensor:
        """A line for each prompt, without queries, and one for each row: its lone token behind that prompt."""
        packed = self._packed
        prompts = [(-1, packed.row(n, 0), 0, len(run.ids), -1) for n, run in enumerate(packed.prompts)]
        rows = self.places + [place for place in self.places for _ in range(copies)] * layers
        own = [(n, packed.rows + n, position, 1, prompt) for n, (prompt, position) in enumerate(rows)]
        return torch.tensor(prompts + own, dtype=torch.int32)


def _overwrite(hooks: Hooks, gate: nn.Module, new: torch.Tensor, moved: torch.Tensor, computed: bool) -> None:
    """What the module puts out for the last rows begins with `new` [born, neurons]; to the first ones `moved` is added.

    computed: the module's own is needed for the last rows too, of which `new` is but a part.
    """
    born, clean = len(new), len(moved)

    def without(module: nn.Module, args: tuple) -> tuple:
        return (args[0][:, :-born], *args[1:])

    def put(out: torch.Tensor) -> torch.Tensor:
        own, added = (x.to(out.device, out.dtype) for x in (new, moved))
        added = nn.functional.pad(added, (0, out.shape[-1] - added.shape[1]))
        if not computed:
            return torch.cat([out[0, :clean] + added, out[0, clean:], own])[None]
        own = torch.cat([own, out[0, -born:, own.shape[1] :]], 1)
        return torch.cat([out[0, :clean] + added, out[0, clean:-born], own])[None]

    if not computed:
        hooks.callback(gate.register_forward_pre_hook(without).remove)
    hooks.behind(gate, put)


def neurons_of(model: EditableModel, layer: int) -> int:
    """What the down projection reads."""
    weight = find_weight(model.hf, f"{model.modules.parameter_name(layer)}.weight")
    return weight.shape[0 if weight.input_first else 1]
