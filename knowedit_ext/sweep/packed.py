"""Whole prompts as packed rows, run layer by layer; what several of them begin with is computed once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..model.load import EditableModel
from .attention import tree_attention_in
from .capture import CleanRun, EmbeddingNoise, RowArguments, clean_runs, split_inputs
from .interventions import Interventions
from .layer import KeysValues, keys_values, run_layer
from .layout import lay_out
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
        self.begins = list(begins or [None] * len(prompts))
        self.interventions = Interventions()
        for number, (prompt, begin) in enumerate(zip(prompts, self.begins, strict=True)):
            parent, first = begin or (None, 0)
            self.interventions.add_root(len(prompt.ids), prompt=number, start=first, parent=parent)
        planner = Planner(self.interventions.roots, range(len(prompts)), model.num_layers)
        self._layout = lay_out(planner.plan([]), model.num_layers)
        self.prompt_of_row = self._layout.prompt
        counts = [root.length - root.start for root in self.interventions.roots]
        self._first_rows = [0, *itertools.accumulate(counts)]
        self.rows = self._first_rows[-1]
        start = torch.cat(
            [p.hidden[0, root.start :] for p, root in zip(prompts, self.interventions.roots, strict=True)]
        )
        self.start, self.inputs = split_inputs(prompts[0], start)
        # Where each prompt begins in all of them, whole, laid end to end.
        self.offsets = torch.tensor([0, *itertools.accumulate(len(prompt.ids) for prompt in prompts)])
        places = self.offsets[self._layout.prompt] + self._layout.position
        self._arguments = RowArguments(prompts, places, self.inputs, torch.arange(self.rows))

    @classmethod
    def sharing(
        cls,
        model: EditableModel,
        prompts: Sequence[Sequence[int]],
        noises: Sequence[EmbeddingNoise | None] | None = None,
    ) -> PackedPrompts:
        """Prompts by their tokens and what is added to their embeddings; what several begin with has its rows once."""
        noises = noises or [None] * len(prompts)
        return cls(model, clean_runs(model, prompts, noises), _begins(prompts, noises))

    def row(self, prompt: int, token: int) -> int:
        begin = self.begins[prompt]
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

    def could_enter(self, layer: int) -> torch.Tensor:
        """`start` as rows that `layer` can run: it finds zeros where earlier ones would have left something."""
        width = sum(handed.width for handed in self._arguments.handed(layer).values())
        return nn.functional.pad(self.start, (0, width))

    def keys_values(self, hidden: torch.Tensor, layer: int) -> KeysValues:
        """Those of one layer, of rows that enter it, and no more of the layer."""
        with tree_attention_in(self.model.modules):
            return keys_values(self.model.modules, layer, hidden, self._arguments)

    def left_of(self, tokens: Sequence[int]) -> tuple[PackedPrompts | None, torch.Tensor]:
        """The prompts' parts left of a token each, and where their rows are among these; None where there are none."""
        ends = list(tokens)
        for number, begin in reversed(list(enumerate(self.begins))):
            if begin is not None:
                ends[begin[0]] = max(ends[begin[0]], min(begin[1], ends[number]))
        starts = [0 if begin is None else begin[1] for begin in self.begins]
        chosen = [n for n, (start, end) in enumerate(zip(starts, ends, strict=True)) if start < end]
        if not chosen:
            return None, torch.empty(0, dtype=torch.int64)
        place = {number: at for at, number in enumerate(chosen)}
        begins = [begin and (place[begin[0]], begin[1]) for begin in (self.begins[n] for n in chosen)]
        runs = clean_runs(self.model, [self.prompts[n].ids[: ends[n]] for n in chosen])
        rows = [torch.arange(ends[n] - starts[n]) + self._first_rows[n] for n in chosen]
        return PackedPrompts(self.model, runs, begins), torch.cat(rows)


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


def _begins(prompts: Sequence[Sequence[int]], noises: Sequence[EmbeddingNoise | None]) -> list[tuple[int, int] | None]:
    """For each prompt the earlier one with which it has the most tokens in common, and how many these are: at most all
    but its last, and none that noise is added to."""
    first_with: dict[tuple[int, ...], int] = {}
    begins: list[tuple[int, int] | None] = []
    for number, (ids, noise) in enumerate(zip(prompts, noises, strict=True)):
        clean = len(ids) if noise is None else min(len(ids), noise.start)
        beginnings = [tuple(ids[:count]) for count in range(1, clean + 1)]
        shared = next((b for b in reversed(beginnings) if b in first_with and len(b) < len(ids)), None)
        begins.append(None if shared is None else (first_with[shared], len(shared)))
        for beginning in beginnings:
            first_with.setdefault(beginning, number)
    return begins
