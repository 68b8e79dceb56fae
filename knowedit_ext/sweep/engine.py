"""The layer sweep: all rows of all runs go through the model's own layers once.

Floor: 2 x parameters of the layers x `Layout.row_layers` flops, and each weight is read once a sweep. Attention, births
and restores move O(rows x hidden) bytes a layer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..model.head import final_states
from ..model.hooks import Hooks, at_rest
from ..model.load import EditableModel
from ..ops import restore_rows
from .attention import tree_attention_in
from .capture import CleanRun, RowArguments
from .interventions import Interventions, Patch, Root, Run
from .layer import run_layer
from .layout import Layout, RestoreRows, lay_out
from .probe import probe
from .segments import Planner

logger = logging.getLogger(__name__)

# Rows a sweep holds where memory is no limit: more bring no speed once GEMMs are at full size, and on a CPU the
# activations of more rows than this fall out of its caches.
BEST_ROWS = {"cpu": 4096}
WIDE_ROWS = 1 << 16


@dataclass(frozen=True)
class SweepResult:
    """Final states (behind the final norm) of the runs: `hidden[run]` is [copies, readout positions, hidden].

    rows: most rows held at once; row_layers: rows x layers computed; sweeps: how many; flops: of the layers' matrices.
    """

    states: torch.Tensor  # [all readout rows, hidden]
    index: list[torch.Tensor]  # by run: int64 [copies, positions] into states
    rows: int
    row_layers: int
    sweeps: int
    flops: int

    def hidden(self, run: int) -> torch.Tensor:
        return self.states[self.index[run]]


@at_rest
def sweep(
    model: EditableModel, prompts: Sequence[CleanRun], interventions: Interventions, max_rows: int | None = None
) -> SweepResult:
    """Compute all runs, exactly, in as few sweeps as `max_rows` allows.

    prompts: the clean runs of the prompts that the roots name. max_rows: rows held at once (chosen from free memory
    when None); results of different `max_rows` agree to rounding.
    """
    if not interventions.runs:
        raise ValueError("no runs: there is nothing to sweep")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows is {max_rows}: expected at least 1")
    probe(model)
    limit = max_rows or default_max_rows(model)
    weights = [sum(p.numel() for p in layer.parameters() if p.dim() > 1) for layer in model.modules.layers]
    states, index, done, most, row_layers, flops = [], [], 0, 0, 0, 0
    chunks = list(split_runs(interventions, limit))
    for runs in chunks:
        used = set().union(*(roots_of(run, interventions.roots) for run in runs))
        layout = lay_out(Planner(interventions.roots, used, model.num_layers).plan(runs), model.num_layers)
        roots = [root for number, root in enumerate(interventions.roots) if number in used]
        hidden = _sweep_layers(model, prompts, roots, layout)
        flat = torch.cat([torch.from_numpy(rows).reshape(-1) for rows in layout.readout])
        rows, inverse = torch.unique(flat, return_inverse=True)  # many runs end in their root's very row
        states.append(final_states(model, hidden[rows.to(hidden.device)]))
        for readout in layout.readout:
            taken, inverse = inverse[: readout.size], inverse[readout.size :]
            index.append(taken.view(readout.shape) + done)
        done += len(rows)
        most, row_layers = max(most, layout.rows[-1]), row_layers + layout.row_layers
        flops += sum(2 * size * rows for size, rows in zip(weights, layout.rows[:-1], strict=True))
    logger.debug("%d runs in %d sweeps of at most %d rows, %d row-layers", len(index), len(chunks), most, row_layers)
    return SweepResult(torch.cat(states), index, most, row_layers, len(chunks), flops)


def default_max_rows(model: EditableModel) -> int:
    """Rows that fit in half of the free memory, at most what still makes a sweep faster."""
    best = BEST_ROWS.get(model.device.type, WIDE_ROWS)
    return max(256, min(best, free_bytes(model.device) // 2 // row_bytes(model)))


def row_bytes(model: EditableModel) -> int:
    """What one row's activations take in one layer, in float32."""
    config = model.modules.config
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * model.hidden_size
    return 4 * (8 * model.hidden_size + 6 * width)


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def split_runs(interventions: Interventions, max_rows: int) -> Iterator[list[Run]]:
    """Runs in order, cut into sweeps of about equal size; with their roots they stay within `max_rows` rows."""
    roots, runs = interventions.roots, interventions.runs
    whole = sum(_most_rows(run, roots[run.root]) for run in runs) + sum(map(_root_rows, roots))
    share = -(-whole // max(1, -(-whole // max_rows)))
    part: list[Run] = []
    used: set[int] = set()
    held, warned = 0, False
    for run in runs:
        needed = used | roots_of(run, roots)
        more = _most_rows(run, roots[run.root]) + sum(_root_rows(roots[number]) for number in needed - used)
        if part and more and (held + more > max_rows or held >= share):
            yield part
            part, used, held = [], set(), 0
            needed = roots_of(run, roots)
            more = _most_rows(run, roots[run.root]) + sum(_root_rows(roots[number]) for number in needed)
        if more > max_rows and not part and not warned:
            warned = True
            logger.warning(
                "max_rows=%d, but one patched run and the unpatched ones it needs have %d rows", max_rows, more
            )
        part.append(run)
        used, held = needed, held + more
    yield part


def roots_of(run: Run, roots: Sequence[Root]) -> set[int]:
    """The roots a run starts from and takes values from, with all that these branch from."""
    needed: set[int] = set()
    for number in (run.root, *(p.source for p in run.patches if isinstance(p, Patch) and isinstance(p.source, int))):
        while number is not None and number not in needed:
            needed.add(number)
            number = roots[number].parent
    return needed


def _root_rows(root: Root) -> int:
    return root.copies * (root.length - root.start)


def _most_rows(run: Run, root: Root) -> int:
    tokens = [token for patch in run.patches for token in patch.tokens]
    return root.copies * (root.length - min(tokens)) if tokens else 0


def _sweep_layers(
    model: EditableModel, prompts: Sequence[CleanRun], roots: Sequence[Root], layout: Layout
) -> torch.Tensor:
    """The packed rows behind the last layer (before the final norm), [rows, hidden]."""
    modules = model.modules
    hidden = torch.cat([root.hidden.reshape(-1, root.hidden.shape[-1]) for root in roots])  # [root rows, hidden]
    offsets = torch.tensor([0, *(len(prompt.ids) for prompt in prompts)]).cumsum(0)
    arguments = RowArguments(prompts, layout.position + offsets[layout.prompt])
    with tree_attention_in(modules), _restoring(model, layout):
        for number in range(model.num_layers):
            born = _bear(hidden, layout, number)
            hidden, _ = run_layer(
                modules, number, born, arguments, layout.segments[number], nearest=layout.nearest.get(number, 0)
            )
            _restore(hidden, layout.restores.get(("layer", number), ()))
    return _bear(hidden, layout, model.num_layers)


def _bear(hidden: torch.Tensor, layout: Layout, layer: int) -> torch.Tensor:
    """Append the rows born at the input of `layer`."""
    if len(layout.births[layer]):
        hidden = torch.cat([hidden, hidden.index_select(0, layout.births[layer].to(hidden.device))])
    _restore(hidden, layout.restores.get(("input", layer), ()))
    return hidden


def _restore(hidden: torch.Tensor, restores: Sequence[RestoreRows]) -> None:
    for restore in restores:
        source = hidden if restore.tensor is None else restore.tensor.to(hidden.device, hidden.dtype)
        restore_rows(hidden, restore.rows.to(hidden.device), source, restore.source_rows.to(hidden.device), restore.add)


@contextmanager
def _restoring(model: EditableModel, layout: Layout) -> Iterator[None]:
    """Hooks on the attention and MLP modules whose outputs the runs patch."""

    with Hooks() as hooks:
        for (site, layer), restores in layout.restores.items():
            if site in ("attn", "mlp"):
                hooks.behind(model.modules.site(site, layer), lambda out, restores=restores: _restore(out[0], restores))
        yield
