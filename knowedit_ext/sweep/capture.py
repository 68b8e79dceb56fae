"""What the model itself feeds its decoder layers: taken by hooks from its own forward pass."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from ..model.families import UnsupportedModelError, device_of
from ..model.forward import own_forward
from ..model.hooks import Hooks, Stop, at_rest, named_arguments
from ..model.load import EditableModel
from .whole import passed_on, runs_whole

# Arguments that a sweep gives its own way: the attention table is mask and cache in one.
_DROPPED = {
    "attention_mask": None,
    "past_key_values": None,
    "past_key_value": None,
    "cache": None,
    "cache_params": None,
    "layer_past": None,
    "use_cache": False,
    "output_attentions": False,
}
KEPT_LENGTHS = 128
_BY_KEY = ("alibi", "position_bias")  # [..., heads, 1, positions], the last of them the prompt's
_BY_POSITION = ("position_embeddings", "position_ids", "cache_position")


@dataclass(frozen=True)
class CleanRun:
    """One clean forward pass of a prompt.

    hidden: [1, tokens, hidden] entering layer 0; logits: [vocab] behind the last token, float32;
    arguments: for each layer what the model passes beside the hidden state; mixing: what a module gets that runs whole
    sequences, empty where none does.
    """

    ids: tuple[int, ...]
    hidden: torch.Tensor
    logits: torch.Tensor
    arguments: list[dict[str, Any]]
    mixing: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class EmbeddingNoise:
    """noise [tokens, hidden] float64 is added to a prompt's embeddings from token `start` on; what would stand behind
    its end is left out."""

    start: int
    noise: torch.Tensor

    def add(self, embedded: torch.Tensor) -> torch.Tensor:
        """embedded [tokens, hidden], a prompt's -> the same, noised."""
        out = embedded.clone()
        here = out[self.start : self.start + len(self.noise)]
        # float64 sum, then the model's dtype, as the published `x += float64` does
        here.copy_((here.double() + self.noise[: len(here)].to(here.device)).to(here.dtype))
        return out


@at_rest
def clean_run(model: EditableModel, ids: Sequence[int]) -> CleanRun:
    """Run a prompt through the model as it is, keeping what enters its layers."""
    arguments: list[dict[str, Any]] = [{} for _ in model.modules.layers]
    mixing: list[dict[str, Any]] = [{} for _ in model.modules.layers]
    hidden: list[torch.Tensor] = []

    def keep(number: int, layer: nn.Module) -> Callable[[tuple, dict[str, Any]], None]:
        def act(args: tuple, kwargs: dict[str, Any]) -> None:
            named = named_arguments(layer, args, kwargs)
            x = named.pop(next(iter(named)))
            if number == 0:
                hidden.append(x.clone())
            arguments[number] = named

        return act

    def keep_mixing(number: int, mixer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mixing[number] = passed_on(mixer, args, kwargs)

    with Hooks() as hooks:
        for number, layer in enumerate(model.modules.layers):
            hooks.before(layer, keep(number, layer), first=True)
            mixer = model.modules.attn(number)
            if model.modules.family.whole or runs_whole(mixer):
                hooks.before(mixer, partial(keep_mixing, number, mixer), first=True)
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.hf.forward).parameters else {}
        logits = own_forward(model, torch.tensor([list(ids)]), use_cache=False, **last).logits[0, -1].float()
    return CleanRun(tuple(ids), hidden[0], logits, arguments, mixing)


@at_rest
def layer_zero_input(
    model: EditableModel, ids: Sequence[int], copies: int, corrupt: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """[copies, tokens, hidden] entering layer 0 when `corrupt` changes the embedding module's output."""
    return _embedded(model, [list(ids)] * copies, corrupt)


@at_rest
def clean_runs(
    model: EditableModel,
    prompts: Sequence[Sequence[int]],
    noises: Sequence[EmbeddingNoise | None] | None = None,
) -> list[CleanRun]:
    """What enters the layers for many prompts, without computing the layers but once for each length a model meets.

    noises: of each prompt what is added to its embeddings, or None. The runs have no logits (an empty tensor): they are
    the start of a sweep.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, ids in enumerate(prompts):
        by_length[len(ids)].append(number)
    runs: list[CleanRun | None] = [None] * len(prompts)
    for numbers in by_length.values():
        arguments = _arguments(model, prompts[numbers[0]])
        added = [None if noises is None else noises[n] for n in numbers]
        corrupt = partial(_add_each, added) if any(added) else None
        hidden = _embedded(model, [list(prompts[n]) for n in numbers], corrupt)
        for row, n in enumerate(numbers):
            runs[n] = CleanRun(tuple(prompts[n]), hidden[row : row + 1], hidden.new_empty(0), *arguments)
    return runs


def _add_each(noises: Sequence[EmbeddingNoise | None], embedded: torch.Tensor) -> torch.Tensor:
    """[prompts, tokens, hidden], each with its own noise."""
    return torch.stack([x if noise is None else noise.add(x) for x, noise in zip(embedded, noises, strict=True)])


def _arguments(model: EditableModel, ids: Sequence[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the layers get beside the hidden state: the same for all prompts of a length, so kept with the model."""
    kept = model.layer_arguments
    key = (len(ids), model.dtype, tuple(str(device_of(layer)) for layer in model.modules.layers))
    if key not in kept:
        while len(kept) >= KEPT_LENGTHS:
            kept.pop(next(iter(kept)))
        run = clean_run(model, ids)
        kept[key] = (
            [
                {name: _DROPPED.get(name) if name in _DROPPED else value for name, value in named.items()}
                for named in run.arguments
            ],
            run.mixing,
        )
    return kept[key]


def _embedded(
    model: EditableModel, ids: list[list[int]], corrupt: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """[prompts, tokens, hidden] entering layer 0; the forward pass is stopped there."""
    embedded: list[torch.Tensor] = []
    first = model.modules.layers[0]

    def stop(args: tuple, kwargs: dict[str, Any]) -> None:
        embedded.append(next(iter(named_arguments(first, args, kwargs).values())))
        raise Stop

    with Hooks() as hooks:
        if corrupt is not None:
            hooks.behind(model.modules.embedding, corrupt)
        hooks.before(first, stop, first=True)
        own_forward(model, torch.tensor(ids), use_cache=False)
    return embedded[0]


class RowArguments:
    """Turns the arguments a layer got for whole prompts into those for packed rows of many prompts.

    runs: the prompts' clean runs; index: int64 [rows] of each row's position in the prompts laid end to end.
    """

    def __init__(self, runs: Sequence[CleanRun], index: torch.Tensor) -> None:
        self.runs = runs
        self.index = index
        self._tables: dict[tuple[int, ...], torch.Tensor] = {}

    def whole(self, layer: int) -> dict[str, Any]:
        """What a module of `layer` that runs whole sequences has to know, see `Attending`."""
        if not self.runs[0].mixing or not self.runs[0].mixing[layer]:
            return {}
        return {
            "lengths": [len(run.ids) for run in self.runs],
            "run_of_row": self._run_of_row.__getitem__,
            "mixing": [run.mixing[layer] for run in self.runs],
        }

    @cached_property
    def _longest(self) -> CleanRun:
        """What it is given by key position holds for the others too, but for what all keys are given alike."""
        return max(self.runs, key=lambda run: len(run.ids))

    @cached_property
    def _run_of_row(self) -> list[int]:
        ends = torch.tensor([len(run.ids) for run in self.runs]).cumsum(0)
        return torch.searchsorted(ends, self.index.cpu(), right=True).tolist()

    def layer(self, layer: int, rows: int, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of `layer` for the first `rows` rows."""
        named: dict[str, Any] = {}
        for name, value in self.runs[0].arguments[layer].items():
            if name in _DROPPED or value is None:
                named[name] = _DROPPED.get(name)
            elif name in _BY_POSITION:
                values = [run.arguments[layer][name] for run in self.runs]
                if isinstance(value, tuple):
                    columns = zip(*values, strict=True)
                    named[name] = tuple(self._rows(column, rows, device) for column in columns)
                else:
                    named[name] = self._rows(values, rows, device, batched=value.dim() > 1)
            elif name in _BY_KEY:
                named[name] = self._longest.arguments[layer][name][..., -len(self._longest.ids) :]
            elif isinstance(value, torch.Tensor):
                raise UnsupportedModelError(
                    f"the model passes its layers a tensor '{name}' beside the states (as Gemma 4 E2B's inputs by "
                    "layer, which noise changes too): a sweep does not know which of its rows gets what"
                )
            else:
                named[name] = value
        return named

    def _rows(
        self, parts: Sequence[torch.Tensor], rows: int, device: torch.device, batched: bool = True
    ) -> torch.Tensor:
        """Rows of per-position tensors [1, tokens, ...] (or [tokens]) -> [1, rows, ...] (or [rows])."""
        key = tuple(id(part) for part in parts)  # layers share tables; the runs keep them alive
        if key not in self._tables:
            if batched and any(len(part) != 1 for part in parts):
                raise UnsupportedModelError(f"positions of {list(parts[0].shape)}: a sweep knows [1, tokens, ...]")
            table = torch.cat([part[0] if batched else part for part in parts])
            self._tables[key] = table.index_select(0, self.index.to(table.device))
        chosen = self._tables[key][:rows].to(device)
        return chosen[None] if batched else chosen
