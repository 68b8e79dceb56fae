"""Whole prompts as packed rows, run layer by layer; and patched rows over them, frozen, with gradients.

Editing needs little of a prompt: keys and values at one token, and, while a value is optimised, the rows from that
token on, in the layers behind the edited one. What lies left of the token or below the layer is computed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ..model.head import final_states
from ..model.hooks import Hooks
from ..model.load import EditableModel
from .attention import tree_attention_in
from .capture import CleanRun, RowArguments
from .interventions import Interventions, Patch
from .layer import KeysValues, run_layer
from .layout import Layout, lay_out
from .probe import probe
from .segments import Planner


class PackedPrompts:
    """Prompts of any lengths in one matrix [rows, hidden] without padding.

    begins: for each prompt None, or (an earlier prompt, first token that is its own): the tokens left of that one are
    the other prompt's, and have no rows here.

    `start` holds the rows that enter layer 0; `row(prompt, token)` is a token's row; `prompt_of_row` [rows].
    """

    def __init__(
        self,
        model: EditableModel,
        prompts: Sequence[CleanRun],
        begins: Sequence[tuple[int, int] | None] | None = None,
    ) -> None:
        probe(model)
        self.model, self.prompts = model, prompts
        self._begins = list(begins or [None] * len(prompts))
        self.interventions = Interventions()
        for number, (prompt, begin) in enumerate(zip(prompts, self._begins, strict=True)):
            parent, first = begin or (None, 0)
            self.interventions.add_root(prompt.hidden[:, first:], prompt=number, start=first, parent=parent)
        planner = Planner(self.interventions.roots, range(len(prompts)), model.num_layers)
        self._layout = lay_out(planner.plan([]), model.num_layers)
        self.prompt_of_row = self._layout.prompt
        counts = [root.length - root.start for root in self.interventions.roots]
        self._first_rows = [0, *itertools.accumulate(counts)]
        self.rows = self._first_rows[-1]
        self.start = torch.cat([root.hidden[0] for root in self.interventions.roots])
        # Where each prompt begins in all of them, whole, laid end to end.
        self.offsets = torch.tensor([0, *itertools.accumulate(len(prompt.ids) for prompt in prompts)])
        self._arguments = RowArguments(prompts, self.offsets[self._layout.prompt] + self._layout.position)

    def row(self, prompt: int, token: int) -> int:
        begin = self._begins[prompt]
        if begin is None:
            return self._first_rows[prompt] + token
        return self._first_rows[prompt] + token - begin[1] if token >= begin[1] else self.row(begin[0], token)

    def run(
        self, hidden: torch.Tensor, first: int, after: int, keep: dict[int, KeysValues] | None = None
    ) -> torch.Tensor:
        """Rows [rows, hidden] entering layer `first` -> entering `after`; `keep` collects keys and values by layer."""
        with tree_attention_in(self.model.modules):
            for number in range(first, after):
                segments = self._layout.segments[number]
                hidden, own = run_layer(self.model.modules, number, hidden, self._arguments, segments)
                if keep is not None:
                    keep[number] = own
        return hidden


class FrozenPrompts:
    """Rows from a token on, over frozen prompts, as a differentiable function of what is added at that token.

    packed: the prompts. tokens: for each prompt the token whose output at `sites` of `layer` is changed. readout: for
    each prompt the positions whose final state is wanted. depth: layers computed (the model's number, or fewer when the
    loss is read from an earlier layer).

    `initial` [prompts, sites, hidden] is the sites' own output at those tokens. Calling it with [prompts, sites,
    hidden] to add gives the states behind the final norm, [all readouts in order, hidden].
    """

    def __init__(
        self,
        packed: PackedPrompts,
        sites: Sequence[str],
        layer: int,
        tokens: Sequence[int],
        readout: Sequence[Sequence[int]],
        depth: int | None = None,
    ) -> None:
        self.model, self.sites, self.edited = packed.model, tuple(sites), layer
        self.depth = self.model.num_layers if depth is None else depth
        self.roots = packed.rows
        layout = self._plan(packed, tokens, readout)
        self._layout = layout
        self._at = []  # of each site one row a prompt, in the prompts' order
        for site in self.sites:
            restored = layout.restores[("input", layer + 1) if site == "layer" else (site, layer)]
            self._at.append(torch.cat([r.rows for r in restored]) - self.roots)
        self._frozen_run(packed, tokens)
        index = packed.offsets[layout.prompt] + layout.position
        self._arguments = RowArguments(packed.prompts, index[self.roots :])
        self._segments = [self._without_root_queries(table) for table in layout.segments]
        self._readout = torch.cat([torch.from_numpy(rows).reshape(-1) for rows in layout.readout])

    def _plan(self, packed: PackedPrompts, tokens: Sequence[int], readout: Sequence[Sequence[int]]) -> Layout:
        planned = Interventions()
        planned.roots = packed.interventions.roots
        nothing = torch.zeros(self.model.hidden_size)
        for number, (token, positions) in enumerate(zip(tokens, readout, strict=True)):
            patches = [Patch(site, (self.edited,), (token,), nothing, "add") for site in self.sites]
            planned.add_run(number, patches, positions)
        planner = Planner(planned.roots, range(len(planned.roots)), self.depth)
        return lay_out(planner.plan(planned.runs), self.depth)

    @torch.no_grad()
    def _frozen_run(self, packed: PackedPrompts, tokens: Sequence[int]) -> None:
        """Run the prompts once; keep keys and values, the rows that newborn ones are copies of, the site's outputs."""
        rows = torch.tensor([packed.row(prompt, token) for prompt, token in enumerate(tokens)])
        self._keys_values: dict[int, KeysValues] = {}
        self._born: dict[int, torch.Tensor] = {}
        states: dict[str, torch.Tensor] = {}

        def record(site: str, out: torch.Tensor) -> None:
            states[site] = out[0, rows.to(out.device)].clone()

        hidden = packed.start
        with Hooks() as hooks:
            for site in self.sites:
                hooks.behind(self.model.modules.site(site, self.edited), partial(record, site))
            for layer in range(self.depth + 1):
                births = self._layout.births[layer]
                if len(births):
                    self._born[layer] = hidden[births.to(hidden.device)]
                if layer < self.depth:
                    keep = self._keys_values if layer >= self.edited else None
                    hidden = packed.run(hidden, layer, layer + 1, keep)
        self.initial = torch.stack([states[site].to(hidden.device) for site in self.sites], dim=1)
        self._final = hidden  # rows of the prompts behind the last layer, for readouts left of the patch

    def _without_root_queries(self, table: torch.Tensor) -> torch.Tensor:
        table = table.clone()
        queries = table[:, 0]
        table[:, 0] = torch.where(queries >= self.roots, queries - self.roots, -1)
        return table

    def __call__(self, added: torch.Tensor) -> torch.Tensor:
        modules = self.model.modules
        hidden = None

        def inject(place: int, out: torch.Tensor) -> torch.Tensor:
            at = self._at[place].to(out.device)
            return out[0].index_add(0, at, added[:, place].to(out.device, out.dtype))[None]

        with tree_attention_in(modules), Hooks() as hooks:
            for place, site in enumerate(self.sites):
                if site != "layer":
                    hooks.behind(modules.site(site, self.edited), partial(inject, place))
            for number in range(self.edited, self.depth + 1):
                born = self._born.get(number)
                if born is not None:
                    hidden = born if hidden is None else torch.cat([hidden, born.to(hidden.device)])
                if "layer" in self.sites and number == self.edited + 1:
                    hidden = inject(self.sites.index("layer"), hidden[None])[0]
                if hidden is None or number == self.depth:
                    continue
                segments, frozen = self._segments[number], self._keys_values[number]
                hidden, _ = run_layer(modules, number, hidden, self._arguments, segments, frozen)
        rows = torch.cat([self._final.to(hidden.device), hidden])[self._readout.to(hidden.device)]
        return final_states(self.model, rows)


def parts_of(rows: Sequence[int], most: int) -> Iterator[slice]:
    """Neighbours whose rows together stay within `most`; one that has more goes alone."""
    first, held = 0, 0
    for number, count in enumerate(rows):
        if number > first and held + count > most:
            yield slice(first, number)
            first, held = number, 0
        held += count
    if rows:
        yield slice(first, len(rows))
