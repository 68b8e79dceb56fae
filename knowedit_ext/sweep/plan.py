"""All that a sweep needs to know but for the model's numbers: planned once, and kept with the interventions."""

from __future__ import annotations

import gc
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from .interventions import Interventions, Patch, Root, Run
from .last import read_alone
from .layout import Layout, lay_out
from .segments import Planner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnePass:
    """One time through the layers. roots: their numbers; places: int64 [rows], of each in the prompts laid end to end;
    read: int64, rows whose final state is wanted. What layers read lies where they compute."""

    roots: list[int]
    layout: Layout
    places: torch.Tensor
    read: torch.Tensor

    def on(self, devices: Sequence[torch.device]) -> OnePass:
        return OnePass(self.roots, self.layout.on(devices), self.places.to(devices[0]), self.read.to(devices[-1]))


@dataclass(frozen=True)
class SweepPlan:
    """passes: one behind the other, their final states [states, hidden] are joined.

    index: by run int64 [copies, positions], where its states are. alike: runs of as many copies and positions together,
    (their numbers, int64 [runs, copies, positions]). places: int64 [states], see `OnePass`.
    """

    passes: list[OnePass]
    index: list[np.ndarray]
    alike: list[tuple[list[int], torch.Tensor]]
    places: torch.Tensor

    @property
    def rows(self) -> int:
        """Most rows held at once."""
        return max(max(one.layout.rows) for one in self.passes)

    @property
    def row_layers(self) -> int:
        return sum(one.layout.row_layers for one in self.passes)


def plan_of(
    interventions: Interventions,
    lengths: Sequence[int],
    devices: Sequence[torch.device],
    max_rows: int,
    origins: bool = False,
    handed: bool = False,
) -> SweepPlan:
    """The plan of these runs over prompts of these lengths, made now or before. devices: where each layer computes;
    origins: see `lay_out`; handed: see `Planner`."""
    key = (tuple(lengths), tuple(devices), max_rows, origins, handed)
    if key not in interventions.plans:
        with _no_garbage():
            interventions.plans[key] = _make(interventions, *key)
    return interventions.plans[key]


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Planning makes objects by the hundred thousand and drops none; to look for garbage among them takes longer."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _make(
    interventions: Interventions,
    lengths: Sequence[int],
    devices: Sequence[torch.device],
    max_rows: int,
    origins: bool,
    handed: bool,
) -> SweepPlan:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    passes, index, places, states = [], [], [], 0
    for runs, used in split_runs(interventions, max_rows):
        planner = Planner(interventions.roots, used, len(devices), handed)
        layout = lay_out(planner.plan(runs), len(devices), origins)
        flat = np.concatenate([rows.reshape(-1) for rows in layout.readout])
        read, inverse = np.unique(flat, return_inverse=True)  # many runs end in their root's very row
        taken, first = inverse + states, 0
        for rows in layout.readout:
            index.append(taken[first : first + rows.size].reshape(rows.shape))
            first += rows.size
        read = torch.from_numpy(read)
        at = offsets[layout.prompt] + layout.position
        places.append(at[read])
        states += len(read)
        layout, read = read_alone(layout, read)
        passes.append(OnePass(sorted(used), layout, at, read).on(devices))
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for run, where in enumerate(index):
        alike[where.shape].append(run)
    together = [(runs, torch.from_numpy(np.stack([index[run] for run in runs]))) for runs in alike.values()]
    plan = SweepPlan(passes, index, together, torch.cat(places))
    logger.debug("%d runs in %d sweeps of at most %d rows", len(index), len(passes), plan.rows)
    return plan


def split_runs(interventions: Interventions, max_rows: int) -> Iterator[tuple[list[Run], set[int]]]:
    """Runs in order, cut into sweeps of about equal size; with the roots they need, which come along, they stay within
    `max_rows` rows."""
    roots, runs = interventions.roots, interventions.runs
    rows = [_most_rows(run, roots[run.root]) for run in runs]
    whole = sum(rows) + sum(map(_root_rows, roots))
    share = -(-whole // max(1, -(-whole // max_rows)))
    part: list[Run] = []
    used: set[int] = set()
    held, warned = 0, False
    for run, own in zip(runs, rows, strict=True):
        needs = roots_of(run, roots)
        more = own + sum(_root_rows(roots[number]) for number in needs - used)
        if part and more and (held + more > max_rows or held >= share):
            yield part, used
            part, used, held = [], set(), 0
            more = own + sum(_root_rows(roots[number]) for number in needs)
        if more > max_rows and not part and not warned:
            warned = True
            logger.warning(
                "max_rows=%d, but one patched run and the unpatched ones it needs have %d rows", max_rows, more
            )
        part.append(run)
        used, held = used | needs, held + more
    yield part, used


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
