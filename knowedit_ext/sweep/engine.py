"""The layer sweep: all rows of all runs go through the model's own layers once.

Floor: 2 x parameters of the layers x `Layout.row_layers` flops, and each weight is read once a sweep. Attention, births
and restores move O(rows x hidden) bytes a layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..model.families import device_of, on_device
from ..model.head import final_states
from ..model.hooks import Hooks, at_rest
from ..model.load import EditableModel
from ..ops import restore_rows
from .attention import tree_attention_in
from .capture import CleanRun, RowArguments, hands_on, input_columns, split_inputs
from .interventions import Interventions
from .layer import keys_values, run_layer
from .layout import Layout, RestoreRows
from .plan import OnePass, SweepPlan, plan_of
from .probe import probe

# Rows a sweep holds where memory is no limit: more bring no speed once GEMMs are at full size, and on a CPU the
# activations of more rows than this fall out of its caches.
BEST_ROWS = {"cpu": 4096}
WIDE_ROWS = 1 << 16


@dataclass(frozen=True)
class SweepResult:
    """Final states (behind the final norm) of the runs: `hidden(run)` is [copies, readout positions, hidden].

    flops: of the layers' matrices, of the last layer's for the rows it computes whole; `rows`: most rows held at once;
    `row_layers`: rows x layers computed; `sweeps`: how many.
    """

    states: torch.Tensor  # [all readout rows, hidden]
    plan: SweepPlan
    flops: int

    @property
    def rows(self) -> int:
        return self.plan.rows

    @property
    def row_layers(self) -> int:
        return self.plan.row_layers

    @property
    def sweeps(self) -> int:
        return len(self.plan.passes)

    def hidden(self, run: int) -> torch.Tensor:
        return self.states[torch.from_numpy(self.plan.index[run])]


@at_rest
def sweep(
    model: EditableModel,
    prompts: Sequence[CleanRun],
    interventions: Interventions,
    hidden: Sequence[torch.Tensor],
    max_rows: int | None = None,
) -> SweepResult:
    """Compute all runs, exactly, in as few sweeps as `max_rows` allows.

    prompts: the clean runs of the prompts that the roots name. hidden: by root [copies, length - start, hidden], the
    rows that enter layer 0. max_rows: rows held at once (chosen from free memory when None); results of different
    `max_rows` agree to rounding. What was planned is kept with the interventions.
    """
    if not interventions.runs:
        raise ValueError("no runs: there is nothing to sweep")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows is {max_rows}: expected at least 1")
    interventions.check_rows([split_inputs(prompts[0], rows)[0] for rows in hidden])
    probe(model)
    return swept(model, prompts, interventions, hidden, max_rows)


def swept(
    model: EditableModel,
    prompts: Sequence[CleanRun],
    interventions: Interventions,
    hidden: Sequence[torch.Tensor],
    max_rows: int | None = None,
) -> SweepResult:
    """`sweep` without its checks, those of the model among them."""
    layers = model.modules.layers
    devices = [device_of(layer) or model.device for layer in layers]
    lengths, most = [len(prompt.ids) for prompt in prompts], max_rows or default_max_rows(model)
    plan = plan_of(interventions, lengths, devices, most, bool(input_columns(prompts[0])), hands_on(prompts[0]))
    states = []
    with tree_attention_in(model.modules):
        for one in plan.passes:
            rows = torch.cat([hidden[root].flatten(0, 1) for root in one.roots])  # [root rows, hidden]
            states.append(final_states(model, _through_the_layers(model, prompts, rows, one)[one.read]))
    weights = [sum(p.numel() for p in layer.parameters() if p.dim() > 1) for layer in layers]
    flops = sum(2 * size * rows for one in plan.passes for size, rows in zip(weights, one.layout.computed, strict=True))
    return SweepResult(torch.cat(states), plan, flops)


def default_max_rows(model: EditableModel) -> int:
    """Rows that fit in half of the free memory, at most what still makes a sweep faster: a power of two, so that what
    was planned serves again when a little more or less is free."""
    best = BEST_ROWS.get(model.device.type, WIDE_ROWS)
    fit = min(best, free_bytes(model.device) // 2 // row_bytes(model))
    return max(256, 1 << max(0, fit.bit_length() - 1))


def row_bytes(model: EditableModel) -> int:
    """What one row's activations take in one layer, in float32."""
    config = model.modules.config
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * model.hidden_size
    return 4 * (8 * model.hidden_size + 6 * width)


def free_bytes(device: torch.device) -> int:
    """What may still be taken on a device, what torch's allocator holds there in reserve included."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _through_the_layers(
    model: EditableModel, prompts: Sequence[CleanRun], hidden: torch.Tensor, one: OnePass
) -> torch.Tensor:
    """The roots' rows entering layer 0 -> all rows behind the last layer (before the final norm), [rows, hidden].

    Nothing here waits for the device, or hands it what lies on the host.
    """
    modules, layout, frozen = model.modules, one.layout, None
    hidden, inputs = split_inputs(prompts[0], hidden)
    width = hidden.shape[1]
    arguments = RowArguments(prompts, one.places, inputs, layout.origin)
    with _restoring(model, layout):
        for number in range(model.num_layers):
            hidden = _bear(on_device(hidden, modules.layers[number]), layout, number, width)
            if layout.last is not None and number == model.num_layers - 1:
                frozen = keys_values(modules, number, hidden, arguments)
                places = one.places.to(layout.last.device)[layout.last]
                origin = None if inputs is None else layout.origin[layout.last.to(layout.origin.device)]
                hidden, arguments = hidden[layout.last], RowArguments(prompts, places, inputs, origin)
            nearest = layout.nearest.get(number, 0)
            hidden, _ = run_layer(modules, number, hidden, arguments, layout.segments[number], frozen, nearest)
            _restore(hidden[:, :width], layout.restores.get(("layer", number), ()))
    return _bear(hidden, layout, model.num_layers, width)


def _bear(hidden: torch.Tensor, layout: Layout, layer: int, width: int) -> torch.Tensor:
    """Append the rows born at the input of `layer`. width: of a state, behind which lies what is handed on."""
    if len(layout.births[layer]):
        hidden = torch.cat([hidden, hidden.index_select(0, layout.births[layer])])
    _restore(hidden[:, :width], layout.restores.get(("input", layer), ()))
    return hidden


def _restore(hidden: torch.Tensor, restores: Sequence[RestoreRows]) -> None:
    for restore in restores:
        source = hidden if restore.tensor is None else restore.tensor.to(hidden.dtype)
        restore_rows(hidden, restore.rows, source, restore.source_rows, restore.add)


@contextmanager
def _restoring(model: EditableModel, layout: Layout) -> Iterator[None]:
    """Hooks on the attention and MLP modules whose outputs the runs patch."""

    with Hooks() as hooks:
        for (site, layer), restores in layout.restores.items():
            if site in ("attn", "mlp"):
                hooks.behind(model.modules.site(site, layer), lambda out, restores=restores: _restore(out[0], restores))
        yield
