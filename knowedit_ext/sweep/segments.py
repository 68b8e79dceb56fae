"""The segment tree: which rows each layer must compute so that every run is exact, and nothing else is computed.

A *stretch* is a piece of consecutive positions of one run (for all copies of its root at once). A run starts as its
root; a patch gives birth to the rows that it changes. At the input of layer l a run owns the rows that differ from its
root's; with m the leftmost of them, attention makes all positions right of m differ behind layer l, so they are born
there as copies of the root's rows. Runs whose patches agree below layer l share their rows up to l, then fork.

    input of layer l:    patched rows | copies of the rows right of them
    attention at l:      own rows, then gaps and everything to the left through the root

A token whose edges are cut in a layer has a line of its own there, with parents that leave the cut positions out.

The planner works on templates (one per run of a root, not per copy); `layout.py` expands them to row numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .interventions import Patch, Root, Run
from .template import ROOT_BIRTH, Entry, Piece, Restore, Stretch, Template


@dataclass(eq=False, slots=True)
class _State:
    """The rows a set of runs owns: stretches sorted by start, and the leftmost position that differs from the root.

    owned: from there on it owns every position. unseen: in the layer in progress the positions that a token's attention
    leaves out, by token.
    """

    root: int
    stretches: list[Stretch]
    front: int | None
    owned: int | None = None
    unseen: dict[int, frozenset[int]] = field(default_factory=dict)

    def find(self, position: int) -> Stretch | None:
        for stretch in self.stretches:
            if stretch.start <= position < stretch.stop:
                return stretch
        return None

    def gaps(self, first: int, after: int) -> list[tuple[int, int]]:
        """The positions of first..after that no stretch owns, as spans."""
        spans = []
        for stretch in self.stretches:
            if first < stretch.start:
                spans.append((first, min(stretch.start, after)))
            first = max(first, stretch.stop)
            if first >= after:
                return spans
        spans.append((first, after))
        return spans

    def reach(self, position: int) -> None:
        """From `position` on the run differs from its root."""
        self.front = position if self.front is None else min(self.front, position)


_Event = tuple[str, int, int, bool]  # site, token, key of its source (or of the positions unseen), add
_ORDER = ("edges", "attn", "mlp", "layer")  # in which a layer computes its sites


@dataclass(eq=False, slots=True)
class _Member:
    """A run on its way through the layers."""

    number: int
    readout: tuple[int, ...]
    events: dict[int, tuple[_Event, ...]]


class Planner:
    """Turns roots and runs into a `Template`. used: the roots that the runs need; num_layers: the model's; handed:
    whether rows carry what earlier layers left, which a newborn one has of its own run's, whatever its state is.
    """

    def __init__(self, roots: Sequence[Root], used: Collection[int], num_layers: int, handed: bool = False) -> None:
        self.num_layers, self.handed = num_layers, handed
        self.specs = roots
        self.births: dict[int, list[Stretch]] = defaultdict(list)
        self.restores: dict[tuple[str, int], list[Restore]] = defaultdict(list)
        self.entries: list[Entry] = []
        self.tensors: list[torch.Tensor] = []
        self.unseen: list[frozenset[int]] = []
        self.nearest: dict[int, int] = {}
        self.rows_of_roots: dict[tuple[int, int], Piece] = {}
        # By root: tokens whose edges some run cuts. Each is a stretch of its own: it can have a sight of its own.
        self.alone: dict[int, set[int]] = defaultdict(set)
        self.roots: dict[int, Stretch] = {}
        for number in sorted(used):  # a parent comes before its children
            spec = roots[number]
            stretch = Stretch(spec.start, spec.length, spec.copies, ROOT_BIRTH, spec.prompt)
            self.roots[number] = stretch
            parent = None if spec.parent is None else self.roots[spec.parent].entry
            self._enter(stretch, 0, parent)

    def plan(self, runs: Sequence[Run]) -> Template:
        self.readout: list[list[Piece]] = [[] for _ in runs]
        by_root: dict[int, list[_Member]] = defaultdict(list)
        for number, run in enumerate(runs):
            self.alone[run.root].update(token for _, token in run.cut)
            by_root[run.root].append(_Member(number, run.readout, self._events(run)))
        for root, members in by_root.items():
            self._follow(_State(root, [], None), members, 0)
        copies = [self.specs[run.root].copies for run in runs]
        roots = list(self.roots.values())
        return Template(roots, self.births, self.restores, self.entries, self.readout, copies, self.nearest)

    # -- runs ------------------------------------------------------------------------------------------------------

    def _events(self, run: Run) -> dict[int, tuple[_Event, ...]]:
        """Patches by layer, in a form that can be compared between runs."""
        events: dict[int, list[_Event]] = defaultdict(list)
        for patch in run.patches:
            for layer in patch.layers:
                if not 0 <= layer < self.num_layers:
                    raise ValueError(f"patch at layer {layer}: the model has layers 0..{self.num_layers - 1}")
        for (layer, token), unseen in sorted(run.cut.items()):
            events[layer].append(("edges", token, self._unseen_key(unseen), False))
        for patch in run.patches:
            if isinstance(patch, Patch):
                key, add = self._source_key(patch), patch.mode == "add"
                here = [(patch.site, token, key, add) for token in patch.tokens]
                for layer in patch.layers:
                    events[layer] += here
        for several in events.values():
            if len(several) > 1:
                several.sort(key=lambda event: _ORDER.index(event[0]))
        return {layer: tuple(some) for layer, some in events.items()}

    def _source_key(self, patch: Patch) -> int:
        """Roots are numbered from 0, tensors from -1 downwards; the same tensor object has one number."""
        if isinstance(patch.source, int):
            return patch.source
        known = next((n for n, t in enumerate(self.tensors) if t is patch.source), None)
        if known is None:
            self.tensors.append(patch.source)
            known = len(self.tensors) - 1
        return -1 - known

    def _unseen_key(self, positions: frozenset[int]) -> int:
        if positions not in self.unseen:
            self.unseen.append(positions)
        return self.unseen.index(positions)

    def _follow(self, state: _State, members: list[_Member], layer: int) -> None:
        """Carry runs that agree so far from the input of `layer` to the end, forking where their patches differ."""
        pending = [(state, members, layer)]
        while pending:
            state, members, layer = pending.pop()
            patched = iter(sorted({at for member in members for at in member.events if at >= layer}))
            while layer < self.num_layers:
                self._extend(state, members, layer)
                layer = next(patched, None)
                if layer is None:
                    break
                here = members[0].events.get(layer, ())
                if len(members) > 1:
                    groups: dict[tuple[_Event, ...], list[_Member]] = defaultdict(list)
                    for member in members:
                        groups[member.events.get(layer, ())].append(member)
                    # One group goes on in place (the unpatched one, if any); the others get copies of the rows.
                    here, *others = sorted(groups, key=len)
                    for events in others:
                        fork = self._fork(state, layer)
                        self._patch(fork, events, layer, groups[events])
                        pending.append((fork, groups[events], layer + 1))
                    members = groups[here]
                self._patch(state, here, layer, members)
                layer += 1
            for member in members:
                self.readout[member.number] = [self._row(state, position) for position in member.readout]

    # -- births ----------------------------------------------------------------------------------------------------

    def _extend(self, state: _State, members: list[_Member], layer: int) -> None:
        """Behind a patch every position to the right differs: own those rows from `layer` on.

        The keys and values of a newborn row are still its root's in its first layer, so in the last layer only rows
        that are read out need to be born.
        """
        if state.front is None or (state.owned is not None and state.owned <= state.front):
            return
        if layer < self.num_layers - 1:
            missing = [p for span in state.gaps(state.front, self.specs[state.root].length) for p in range(*span)]
            state.owned = state.front
        else:
            read = {p for member in members for p in member.readout if p > state.front}
            missing = [p for p in read if state.find(p) is None]
        if missing:
            self._bear(state, missing, layer)

    def _bear(self, state: _State, positions: list[int], layer: int) -> None:
        """Own `positions` from the input of `layer` on, as copies of the root's rows."""
        for first, after in _runs_of(positions, self.alone[state.root]):
            stretch = self._new(state, first, after, layer)
            stretch.sources = stretch.origin = self._root_pieces(state.root, first, after)
        self._link(state, layer)

    def _new(self, state: _State, first: int, after: int, layer: int) -> Stretch:
        spec = self.specs[state.root]
        stretch = Stretch(first, after, spec.copies, layer, spec.prompt)
        self.births[layer].append(stretch)
        state.stretches = sorted([*state.stretches, stretch], key=lambda s: s.start)
        return stretch

    def _fork(self, state: _State, layer: int) -> _State:
        fork = _State(state.root, [], state.front, state.owned)
        for stretch in state.stretches:
            copy = self._new(fork, stretch.start, stretch.stop, layer)
            copy.origin = stretch.origin
            if stretch.birth < layer:
                copy.sources = [Piece(stretch, stretch.start, stretch.stop)]
                continue
            copy.sources = stretch.sources  # twins: born together from the same rows
            twins = [r for r in self.restores["input", layer] if r.target.stretch is stretch]
            self.restores["input", layer] += [
                Restore(Piece(copy, r.target.start, r.target.stop), r.source, r.add) for r in twins
            ]
        self._link(fork, layer)
        return fork

    def _patch(self, state: _State, events: tuple[_Event, ...], layer: int, members: list[_Member]) -> None:
        if state.unseen or (events and events[0][0] == "edges"):
            self._cut(state, [event for event in events if event[0] == "edges"], layer)
        for site, token, key, add in events[len(state.unseen) :]:
            if site == "layer":
                self._see_all(state, layer + 1)
            source = self.tensors[-1 - key] if key < 0 else self._root_piece(key, token)
            owner = state.find(token)
            if owner is not None and owner.birth > layer:  # born by an earlier patch behind this very layer
                self._restore("input", owner.birth, owner, token, source, add)
                continue
            if owner is None:
                if not add and isinstance(source, Piece) and source == self._root_piece(state.root, token):
                    continue  # the run still equals its root there: nothing would change
                if site == "layer":
                    state.reach(token)
                    if layer + 1 < self.num_layers or any(token in member.readout for member in members):
                        self._bear_behind(state, token, layer, source, add)
                    continue
                self._bear(state, [token], layer)
                owner = state.find(token)
            self._restore(site, layer, owner, token, source, add)
            state.reach(token)
        self._see_all(state, layer + 1)

    def _cut(self, state: _State, events: Sequence[_Event], layer: int) -> None:
        """Have tokens attend without some positions in `layer`; behind it they differ from the root's."""
        state.unseen = {token: self.unseen[key] for _, token, key, _ in events}
        if state.unseen:
            missing = [token for token in state.unseen if state.find(token) is None]
            self._bear(state, missing, layer)
            state.reach(min(state.unseen))

    def _see_all(self, state: _State, layer: int) -> None:
        """From `layer` on no token's edges are cut, until they are again."""
        if state.unseen:
            state.unseen = {}
            self._link(state, layer)

    def _bear_behind(self, state: _State, token: int, layer: int, source: Piece | torch.Tensor, add: bool) -> None:
        """Own a token from behind `layer` on, born as what the patch puts there."""
        stretch = self._new(state, token, token + 1, layer + 1)
        stretch.sources = stretch.origin = [self._root_piece(state.root, token)]
        if isinstance(source, Piece) and not add and not self.handed:
            stretch.sources = [source]
        else:
            self._restore("input", layer + 1, stretch, token, source, add)
        self._link(state, layer + 1)

    def _restore(
        self, site: str, layer: int, owner: Stretch, token: int, source: Piece | torch.Tensor, add: bool
    ) -> None:
        self.restores[site, layer].append(Restore(Piece(owner, token, token + 1), source, add))

    # -- rows and attention ----------------------------------------------------------------------------------------

    def _root_pieces(self, root: int, first: int, after: int) -> list[Piece]:
        """Where the rows [first, after) of a root lie: left of its start they are its parent's."""
        stretch, parent = self.roots[root], self.specs[root].parent
        if parent is None or first >= stretch.start:
            return [Piece(stretch, first, after)]
        left = self._root_pieces(parent, first, min(after, stretch.start))
        return left + ([Piece(stretch, stretch.start, after)] if after > stretch.start else [])

    def _root_piece(self, root: int, position: int) -> Piece:
        piece = self.rows_of_roots.get((root, position))
        if piece is None:
            piece = self.rows_of_roots[root, position] = self._root_pieces(root, position, position + 1)[0]
        return piece

    def _row(self, state: _State, position: int) -> Piece:
        owner = state.find(position)
        return Piece(owner, position, position + 1) if owner else self._root_piece(state.root, position)

    def _enter(self, stretch: Stretch, layer: int, parent: Entry | None, keys: Piece | None = None) -> None:
        stretch.entry = Entry(Piece(stretch, stretch.start, stretch.stop), stretch.copies, True, layer)
        stretch.entry.see(layer, parent, keys)
        self.entries.append(stretch.entry)

    def _view(self, piece: Piece, copies: int, layer: int, parent: Entry | None) -> Entry:
        """Rows for others to see: a line without queries."""
        view = Entry(piece, copies, False, layer)
        view.see(layer, parent)
        self.entries.append(view)
        return view

    def _link(self, state: _State, layer: int) -> None:
        """Chain the stretches from left to right behind the root; gaps between them are views of the root's rows."""
        parent = self.roots[state.root].entry
        seen = None
        for stretch in state.stretches:
            if seen is not None and seen < stretch.start:
                for piece in self._root_pieces(state.root, seen, stretch.start):
                    parent = self._view(piece, stretch.copies, layer, parent)
            unseen = state.unseen.get(stretch.start)
            sight = (parent, None) if unseen is None else self._without(state, stretch, unseen, layer)
            if stretch.entry is None:
                self._enter(stretch, layer, *sight)
            else:
                stretch.entry.see(layer, *sight)
            alone = stretch.start in self.alone[state.root]  # what it sees is not what those right of it see
            whole = Piece(stretch, stretch.start, stretch.stop)
            parent = self._view(whole, stretch.copies, layer, parent) if alone else stretch.entry
            seen = stretch.stop

    def _without(
        self, state: _State, stretch: Stretch, unseen: frozenset[int], layer: int
    ) -> tuple[Entry | None, Piece | None]:
        """What a token sees without some positions: the views left of it, and the keys in the place of its own."""
        token = stretch.start
        seen = [p for p in range(token) if p not in unseen]
        keys = None
        if token in unseen:
            keys = self._row(state, seen.pop())
            self.nearest[layer] = max(self.nearest.get(layer, 0), token - keys.start)
        parent = None
        for piece in self._pieces(state, seen):
            parent = self._view(piece, stretch.copies, layer, parent)
        return parent, keys

    def _pieces(self, state: _State, positions: list[int]) -> Iterator[Piece]:
        """Where the run's rows of some positions lie."""
        edges = {edge for stretch in state.stretches for edge in (stretch.start, stretch.stop)}
        for first, after in _runs_of(positions, edges | {edge - 1 for edge in edges}):
            owner = state.find(first)
            yield from [Piece(owner, first, after)] if owner else self._root_pieces(state.root, first, after)


def _runs_of(positions: list[int], alone: Collection[int] = ()) -> list[tuple[int, int]]:
    """[2, 3, 4, 7] -> [(2, 5), (7, 8)]; with 3 alone: [(2, 3), (3, 4), (4, 5), (7, 8)]"""
    spans: list[tuple[int, int]] = []
    for p in sorted(positions):
        if spans and spans[-1][1] == p and p not in alone and p - 1 not in alone:
            spans[-1] = (spans[-1][0], p + 1)
        else:
            spans.append((p, p + 1))
    return spans
