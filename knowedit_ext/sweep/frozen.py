"""Patched rows over frozen prompts, with gradients.

While a value is optimised, only the rows from its token on are computed, in the layers behind the edited one. What lies
left of the token or below the layer is computed once, and so are the edited MLP itself and what the next layer's
attention projects of the rows that the change has not reached yet.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from ..model.head import final_states
from ..model.hooks import Hooks
from .attention import layer_in_progress, tree_attention_in
from .capture import RowArguments
from .interventions import Interventions, Patch
from .layer import KeysValues, keys_values, run_layer
from .layout import lay_out
from .packed import PackedPrompts
from .segments import Planner
from .whole import mixes_whole


class FrozenPrompts:
    """Rows from a token on, over frozen prompts, as a differentiable function of what is added at that token.

    packed: the prompts. tokens: for each prompt the token whose output at `sites` of `layer` is changed. readout: for
    each prompt the positions whose final state is wanted, none left of its token. depth: layers computed (the model's
    number, or fewer when the loss is read from an earlier layer).

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
        if any(min(positions) < token for token, positions in zip(tokens, readout, strict=True)):
            raise ValueError("a state is read left of the token that is changed, where nothing changes")
        self.model, self.packed, self.sites, self.edited = packed.model, packed, tuple(sites), layer
        self.depth = self.model.num_layers if depth is None else depth
        self._tokens, self._positions = list(tokens), [tuple(positions) for positions in readout]
        self._left, self._left_rows = packed.left_of(tokens)
        self._plan(range(len(tokens)))
        self._frozen_run()

    def only(self, prompts: Sequence[int]) -> FrozenPrompts:
        """The same of some of the prompts; nothing is computed again."""
        few = copy.copy(self)
        few._plan([self._chosen[prompt] for prompt in prompts])
        few.initial = self.initial[list(prompts)]
        few._born = {}
        for layer, rows in few._births.items():
            place = {row: at for at, row in enumerate(self._births[layer].tolist())}
            kept = [place[row] for row in rows.tolist()]
            few._born[layer] = self._born[layer][kept]
            if layer == self.edited + 1:
                few._projected = [(module, out[kept]) for module, out in self._projected]
        return few

    def _plan(self, prompts: Sequence[int]) -> None:
        """Lay out the live rows of some of the prompts. They are numbered from 0, behind the frozen ones as keys."""
        self._chosen, roots = list(prompts), self.packed.rows
        planned = Interventions()
        planned.roots = self.packed.interventions.roots
        nothing = torch.zeros(self.model.hidden_size)
        for number in self._chosen:
            patches = [Patch(site, (self.edited,), (self._tokens[number],), nothing, "add") for site in self.sites]
            planned.add_run(number, patches, self._positions[number])
        planner = Planner(planned.roots, range(len(planned.roots)), self.depth)
        layout = lay_out(planner.plan(planned.runs), self.depth)
        self._births = {layer: rows for layer, rows in enumerate(layout.births) if len(rows)}
        self._whole = max(self._births) + 1  # from this layer on live rows see frozen ones left of the tokens alone
        self._at = []  # of each site one row a prompt, in the prompts' order
        for site in self.sites:
            restored = layout.restores[("input", self.edited + 1) if site == "layer" else (site, self.edited)]
            self._at.append(torch.cat([r.rows for r in restored]) - roots)
        self._readout = torch.cat([torch.from_numpy(rows).reshape(-1) for rows in layout.readout]) - roots
        index = (self.packed.offsets[layout.prompt] + layout.position)[roots:]
        self._arguments = RowArguments(self.packed.prompts, index)
        every = torch.arange(roots)
        self._segments = [
            _live(table, roots, every if layer < self._whole else self._left_rows)
            for layer, table in enumerate(layout.segments)
        ]
        if self.edited < self.depth - 1:
            if (self._readout < 0).any():
                raise ValueError("a state is read that nothing of the change reaches")
            self._read_arguments = RowArguments(self.packed.prompts, index[self._readout])
            self._read_segments = _of_rows(self._segments[-1], self._readout)

    @torch.no_grad()
    def _frozen_run(self) -> None:
        """Run the prompts once; keep keys and values, the rows that newborn ones are copies of, the sites' outputs."""
        packed = self.packed
        rows = torch.tensor([packed.row(prompt, token) for prompt, token in enumerate(self._tokens)])
        self._keys_values: dict[int, KeysValues] = {}
        self._born: dict[int, torch.Tensor] = {}
        self._projected: list[tuple[nn.Module, torch.Tensor]] = []
        states: dict[str, torch.Tensor] = {}

        def record(site: str, out: torch.Tensor) -> None:
            states[site] = out[0, rows.to(out.device)].clone()

        hidden = packed.start
        with Hooks() as hooks:
            for site in self.sites:
                hooks.behind(self.model.modules.site(site, self.edited), partial(record, site))
            for layer in range(self._whole):
                if layer in self._births:
                    self._born[layer] = hidden[self._births[layer].to(hidden.device)]
                if layer < self.depth:
                    keep = self._keys_values if layer >= self.edited else None
                    with Hooks() as projections:
                        if layer == self.edited + 1 < self.depth - 1 and not mixes_whole(self.model.modules):
                            self._record_projected(projections, layer)
                        hidden = packed.run(hidden, layer, layer + 1, keep)
        self.initial = torch.stack([states[site].to(hidden.device) for site in self.sites], dim=1)
        self._final = hidden  # where the edited layer is the last, the change does not reach what is read behind it
        if self._whole < self.depth and self._left is not None:
            last = self.depth - 1
            hidden = self._left.run(hidden[self._left_rows.to(hidden.device)], self._whole, last, self._keys_values)
            self._keys_values[last] = self._left.keys_values(hidden, last)

    def _record_projected(self, hooks: Hooks, layer: int) -> None:
        """Of rows born in a layer, what each projection of its attention puts out: those that run before rows mix."""
        rows, width = self._births[layer], self.model.hidden_size

        def record(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            plain = len(args) == 1 and args[0].shape == (1, self.packed.rows, width) and isinstance(out, torch.Tensor)
            if plain and layer_in_progress().recorded is None:
                self._projected.append((module, out[0, rows.to(out.device)].clone()))

        for module in self.model.modules.attn(layer).modules():
            if not list(module.children()) and list(module.parameters()):
                hooks.callback(module.register_forward_hook(record).remove)

    def __call__(self, added: torch.Tensor) -> torch.Tensor:
        modules, last = self.model.modules, self.depth - 1
        hidden = None

        def inject(place: int, out: torch.Tensor) -> torch.Tensor:
            at = self._at[place].to(out.device)
            return out[0].index_add(0, at, added[:, place].to(out.device, out.dtype))[None]

        with tree_attention_in(modules), Hooks() as hooks:
            if self.sites == ("mlp",):  # nothing changes what it reads
                own = self.initial[:, 0].index_select(0, self._at[0].argsort().to(self.initial.device))
                _known(hooks, modules.site("mlp", self.edited), self._at[0][:0], own)
            for place, site in enumerate(self.sites):
                if site != "layer":
                    hooks.behind(modules.site(site, self.edited), partial(inject, place))
            for number in range(self.edited, self.depth + 1):
                born = self._born.get(number)
                if born is not None:
                    hidden = born if hidden is None else torch.cat([hidden, born.to(hidden.device)])
                if number == self.edited + 1:
                    for module, out in self._projected:
                        _known(hooks, module, self._at[0], out)
                if "layer" in self.sites and number == self.edited + 1:
                    hidden = inject(self.sites.index("layer"), hidden[None])[0]
                if hidden is None or number == self.depth:
                    continue
                arguments, segments, frozen = self._arguments, self._segments[number], self._keys_values.get(number)
                if number == last > self.edited:  # of all rows the keys and values, the rest where it is read
                    own = keys_values(modules, number, hidden, arguments)
                    frozen = own if frozen is None else tuple(map(torch.cat, zip(frozen, own, strict=True)))
                    arguments, segments = self._read_arguments, self._read_segments
                    hidden = hidden[self._readout.to(hidden.device)]
                hidden, _ = run_layer(modules, number, hidden, arguments, segments, frozen)
        if last == self.edited:
            rows = self._readout.to(hidden.device) + self.packed.rows
            hidden = torch.cat([self._final.to(hidden.device), hidden])[rows]
        return final_states(self.model, hidden)


def _known(hooks: Hooks, module: nn.Module, changed: torch.Tensor, known: torch.Tensor) -> None:
    """What a module puts out for the last of the rows it is given is `known` [rows, width], but for those that are
    changed, which alone it computes; for one at least: not every module takes none."""
    given = 0

    def without(module: nn.Module, args: tuple) -> tuple:
        nonlocal given
        given = args[0].shape[-2]
        some = changed.to(args[0].device) if len(changed) else torch.zeros(1, dtype=torch.int64, device=args[0].device)
        return (args[0].index_select(-2, some), *args[1:])

    def put(out: torch.Tensor) -> torch.Tensor:
        whole = out.new_empty(given, out.shape[-1])
        whole[given - len(known) :] = known
        return whole.index_copy(0, changed.to(out.device), out[0, : len(changed)])[None]

    hooks.callback(module.register_forward_pre_hook(without).remove)
    hooks.behind(module, put)


def _live(table: torch.Tensor, roots: int, kept: torch.Tensor) -> torch.Tensor:
    """A table without the roots' queries, live rows numbered from 0; of the roots' keys there are the rows `kept`."""
    table = table.clone()
    query, key, length = table[:, 0], table[:, 1], table[:, 3]
    before = torch.zeros(roots + 1, dtype=torch.int32)  # rows that are kept before each
    before[1:] = torch.zeros(roots, dtype=torch.int32).index_fill(0, kept, 1).cumsum(0)
    frozen = key < roots
    first, after = (before[at.clamp(max=roots).long()] for at in (key, key + length))
    table[:, 0] = torch.where(query >= roots, query - roots, -1)
    table[:, 1] = torch.where(frozen, first, key - roots + len(kept))
    table[:, 3] = torch.where(frozen, after - first, length)
    return table


def _of_rows(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A table whose queries are some rows of another one's, in this order; what they see stays."""
    asking = (table[:, 0] >= 0).nonzero()[:, 0]
    first, length = table[asking, 0].long(), table[asking, 3].long()
    line = torch.full((int((first + length).max()),), -1)
    line[torch.cat([torch.arange(a, a + n) for a, n in zip(first.tolist(), length.tolist(), strict=True)])] = (
        torch.repeat_interleave(asking, length)
    )
    whole = line[rows]
    step = rows - table[whole, 0]
    own = [torch.arange(len(rows)), table[whole, 1] + step, table[whole, 2] + step, torch.ones(len(rows)), whole]
    views = table.clone()
    views[:, 0] = -1
    return torch.cat([views, torch.stack([x.to(torch.int32) for x in own], dim=1)])
