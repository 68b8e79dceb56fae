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

from ..model.families import device_of
from ..model.head import final_states
from ..model.hooks import Hooks
from .attention import layer_in_progress, tree_attention_in
from .capture import RowArguments
from .interventions import Interventions, Patch
from .last import of_rows
from .layer import KeysValues, keys_values, run_layer
from .layout import lay_out, on_devices
from .packed import PackedPrompts
from .segments import Planner
from .whole import mixes_whole


class FrozenPrompts:
    """Rows from a token on, over frozen prompts, as a differentiable function of what is added at that token.

    packed: the prompts. tokens: for each prompt the token whose output at `sites` of `layer` is changed. readout: for
    each prompt the positions whose final state is wanted, none left of its token. depth: layers computed (the model's
    number, or fewer when the loss is read from an earlier layer).

    `initial` [prompts, sites, hidden] is the sites' own output at those tokens; `keys` [prompts, d_in] what the layer's
    down projection reads there, None unless asked for by `keys`. Calling it with [prompts, sites, hidden] to add gives
    the states behind the final norm, [all readouts in order, hidden].
    """

    def __init__(
        self,
        packed: PackedPrompts,
        sites: Sequence[str],
        layer: int,
        tokens: Sequence[int],
        readout: Sequence[Sequence[int]],
        depth: int | None = None,
        keys: bool = False,
    ) -> None:
        if any(min(positions) < token for token, positions in zip(tokens, readout, strict=True)):
            raise ValueError("a state is read left of the token that is changed, where nothing changes")
        self.model, self.packed, self.sites, self.edited = packed.model, packed, tuple(sites), layer
        self.depth = self.model.num_layers if depth is None else depth
        self._tokens, self._positions = list(tokens), [tuple(positions) for positions in readout]
        self._left, self._left_rows = packed.left_of(tokens)
        self._plan()
        self.keys: torch.Tensor | None = None
        self._frozen_run(keys)

    def only(self, prompts: Sequence[int]) -> FrozenPrompts:
        """The same of some of the prompts, by slices of what is there: nothing is computed or planned again."""
        few = copy.copy(self)
        few._numbers = self._numbers[list(prompts)]
        kept = torch.isin(self._owner, few._numbers)
        place = kept.cumsum(0) - 1
        reads = self._readout.split(self._counts)
        few._counts = [self._counts[prompt] for prompt in prompts]
        few._owner, few._index = self._owner[kept], self._index[kept]
        few._origin = self._origin[kept] if len(self._origin) else self._origin
        few._at = [place[at[list(prompts)]] for at in self._at]
        few._readout = torch.cat([reads[prompt] for prompt in prompts])
        few._readout = torch.where(few._readout < 0, few._readout, place[few._readout.clamp(min=0)])
        few.initial = self.initial[list(prompts)]
        few._born, first = {}, 0
        for layer, rows in self._born.items():
            here = kept[first : first + len(rows)]
            few._born[layer] = rows[here]
            if layer == self.edited + 1:
                few._projected = [(module, out[here]) for module, out in self._projected]
            first += len(rows)
        numbers = torch.arange(len(self._readout)).split(self._counts)
        reading = torch.full((len(self._readout),), -1)
        reading[torch.cat([numbers[prompt] for prompt in prompts])] = torch.arange(len(few._readout))
        few._tables, few._keys_values, sliced = dict(self._tables), dict(self._keys_values), {}
        for layer, table in self._tables.items():
            frozen = self._keys_values.get(layer)
            count = 0 if frozen is None else len(frozen[0])
            known = id(table), count
            if known not in sliced:
                asking = reading if self._reads_in(layer) else torch.where(kept, place, -1)
                sliced[known] = slice_table(table, count, torch.where(kept, place, -1), asking)
            few._tables[layer], rows = sliced[known]
            if frozen is not None:
                few._keys_values[layer] = tuple(x[rows.to(x.device)] for x in frozen)
        few._place()
        return few

    def _plan(self) -> None:
        """Lay out the live rows. They are numbered from 0, behind the frozen ones as keys."""
        roots, planned = self.packed.rows, Interventions()
        planned.roots = self.packed.interventions.roots
        nothing = torch.zeros(self.model.hidden_size)
        for number, (token, positions) in enumerate(zip(self._tokens, self._positions, strict=True)):
            patches = [Patch(site, (self.edited,), (token,), nothing, "add") for site in self.sites]
            planned.add_run(number, patches, positions)
        planner = Planner(planned.roots, range(len(planned.roots)), self.depth)
        layout = lay_out(planner.plan(planned.runs), self.depth, self.packed.inputs is not None)
        self._births = {layer: rows for layer, rows in enumerate(layout.births) if len(rows)}
        self._whole = max(self._births) + 1  # from this layer on live rows see frozen ones left of the tokens alone
        self._at = []  # of each site one row a prompt, in the prompts' order
        for site in self.sites:
            restored = layout.restores[("input", self.edited + 1) if site == "layer" else (site, self.edited)]
            self._at.append(torch.cat([r.rows for r in restored]) - roots)
        self._readout = torch.cat([torch.from_numpy(rows).reshape(-1) for rows in layout.readout]) - roots
        self._counts = [rows.size for rows in layout.readout]  # of a prompt
        self._numbers, self._owner = torch.arange(len(self._tokens)), layout.prompt[roots:]
        self._index = (self.packed.offsets[layout.prompt] + layout.position)[roots:]
        self._origin = layout.origin[roots:]
        every, live = torch.arange(roots), {}
        self._tables: dict[int, torch.Tensor] = {}  # by layer
        for layer in range(self.edited, self.depth):
            known = id(layout.segments[layer]), layer < self._whole
            if known not in live:
                table = _by_prompt(layout.segments[layer], layout.prompt)
                live[known] = _live(table, roots, every if layer < self._whole else self._left_rows)
            self._tables[layer] = live[known]
        if self._reads_in(self.depth - 1):
            if (self._readout < 0).any():
                raise ValueError("a state is read that nothing of the change reaches")
            self._tables[self.depth - 1] = of_rows(self._tables[self.depth - 1], self._readout)
        self._place()

    def _reads_in(self, layer: int) -> bool:
        """Whether the queries in this layer are the rows that are read, of all rows the keys and values alone."""
        return layer == self.depth - 1 > self.edited

    def _place(self) -> None:
        """Put what layers index by where they compute."""
        layers = self.model.modules.layers
        devices = {layer: device_of(layers[layer]) or self.model.device for layer in self._tables}
        self._segments = dict(
            zip(devices, on_devices(list(self._tables.values()), list(devices.values())), strict=True)
        )
        first, last = devices[self.edited], devices[self.depth - 1]
        self._at_there, self._readout_there = [at.to(first) for at in self._at], self._readout.to(last)
        prompts, inputs = self.packed.prompts, self.packed.inputs
        self._arguments = RowArguments(prompts, self._index.to(first), inputs, self._origin)
        if self._reads_in(self.depth - 1):
            origin = self._origin if inputs is None else self._origin[self._readout]
            self._read_arguments = RowArguments(prompts, self._index[self._readout].to(last), inputs, origin)

    @torch.no_grad()
    def _frozen_run(self, keys: bool) -> None:
        """Run the prompts once; keep keys and values, the rows that newborn ones are copies of, the sites' outputs."""
        packed = self.packed
        rows = torch.tensor([packed.row(prompt, token) for prompt, token in enumerate(self._tokens)])
        self._keys_values: dict[int, KeysValues] = {}
        self._born: dict[int, torch.Tensor] = {}
        self._projected: list[tuple[nn.Module, torch.Tensor]] = []
        states: dict[str, torch.Tensor] = {}

        def record(site: str, out: torch.Tensor) -> None:
            states[site] = out[0, rows.to(out.device)].clone()

        def record_keys(args: tuple, kwargs: dict) -> None:
            self.keys = args[0].reshape(-1, args[0].shape[-1])[rows.to(args[0].device)].clone()

        hidden = packed.start
        with Hooks() as hooks:
            if keys:
                hooks.before(self.model.modules.down_projection(self.edited), record_keys)
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
            at, given = self._at_there[place].to(out.device), added[:, place].to(out.device, out.dtype)
            given = nn.functional.pad(given, (0, out.shape[-1] - given.shape[-1]))  # none to what is handed on
            return out.squeeze(0).index_add(0, at, given)[None]

        with tree_attention_in(modules), Hooks() as hooks:
            if self.sites == ("mlp",):  # nothing changes what it reads
                own = self.initial[:, 0].index_select(0, self._at_there[0].argsort())
                _known(hooks, modules.site("mlp", self.edited), self._at_there[0][:0], own)
            for place, site in enumerate(self.sites):
                if site != "layer":
                    hooks.behind(modules.site(site, self.edited), partial(inject, place))
            for number in range(self.edited, self.depth + 1):
                born = self._born.get(number)
                if born is not None:
                    hidden = born if hidden is None else torch.cat([hidden, born.to(hidden.device)])
                if number == self.edited + 1:
                    for module, out in self._projected:
                        _known(hooks, module, self._at_there[0], out)
                if "layer" in self.sites and number == self.edited + 1:
                    hidden = inject(self.sites.index("layer"), hidden[None]).squeeze(0)
                if hidden is None or number == self.depth:
                    continue
                arguments, segments, frozen = self._arguments, self._segments[number], self._keys_values.get(number)
                if self._reads_in(number):
                    own = keys_values(modules, number, hidden, arguments)
                    frozen = own if frozen is None else tuple(map(torch.cat, zip(frozen, own, strict=True)))
                    arguments, hidden = self._read_arguments, hidden[self._readout_there]
                hidden, _ = run_layer(modules, number, hidden, arguments, segments, frozen)
        if last == self.edited:
            rows = self._readout_there + self.packed.rows
            hidden = torch.cat([self._final.to(hidden.device), hidden])[rows]
        return final_states(self.model, hidden[:, : added.shape[-1]])


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
        return whole.index_copy(0, changed.to(out.device), out.squeeze(0)[: len(changed)])[None]

    hooks.callback(module.register_forward_pre_hook(without).remove)
    hooks.behind(module, put)


def slice_table(
    table: torch.Tensor, frozen: int, live: torch.Tensor, asking: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A table of some of its queries, and the frozen key rows that these see, ascending.

    Of its keys `frozen` come first. live: new number of each other key row, -1 where it is gone; asking: of each query.
    """
    query, key, _, length, parent = table.long().unbind(1)
    reached = needed = (query >= 0) & (asking[query.clamp(min=0)] >= 0)
    while reached.any():
        above = parent[reached]
        reached = torch.zeros_like(needed).index_fill(0, above[above >= 0], True) & ~needed
        needed = needed | reached
    still = (key < frozen) | (length == 0)
    seen = torch.zeros(frozen + 1, dtype=torch.int64)
    here = needed & still & (length > 0)
    seen.index_add_(0, key[here], torch.ones_like(key[here])).index_add_(
        0, (key + length)[here], -torch.ones_like(key[here])
    )
    rows = (seen.cumsum(0)[:frozen] > 0).nonzero()[:, 0]
    before = torch.zeros(frozen + 1, dtype=torch.int64)
    before[1:] = torch.zeros(frozen, dtype=torch.int64).index_fill(0, rows, 1).cumsum(0)
    few = table[needed].clone()
    own = live[(key - frozen).clamp(min=0)] if len(live) else torch.zeros_like(key)
    few[:, 0] = torch.where(query < 0, -1, asking[query.clamp(min=0)])[needed]
    few[:, 1] = torch.where(still, before[key.clamp(max=frozen)], len(rows) + own)[needed]
    few[:, 4] = torch.where(parent < 0, -1, (needed.cumsum(0) - 1)[parent.clamp(min=0)])[needed]
    return few, rows


def _by_prompt(table: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """A table with the lines of a prompt beside each other: keys' gradients look at the lines between the first and the
    last that see them. prompt: of each row."""
    order = prompt[table[:, 1].long().clamp(max=len(prompt) - 1)].argsort(stable=True)
    table, place = table[order], order.argsort()
    table[:, 4] = torch.where(table[:, 4] < 0, -1, place[table[:, 4].clamp(min=0)])
    return table


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
