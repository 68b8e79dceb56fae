"""What the model itself feeds its decoder layers: taken by hooks from its own forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from ..model.families import UnsupportedModelError, device_of
from ..model.forward import own_forward
from ..model.hooks import Hooks, Stop, at_rest, named_arguments
from ..model.load import EditableModel
from .handed import Handed
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

    hidden: [1, tokens, hidden] entering layer 0, and behind it in the same rows what layers get of each token besides
    (Gemma 4's inputs by layer, see `input_columns`); logits: [vocab] behind the last token, float32;
    arguments: for each layer what the model passes beside the hidden state, of a mapping what the layer finds in it;
    mixing: what a module gets that runs whole sequences, empty where none does; sight: for each layer how many
    positions its mask lets a token see, 0 for a mask that is no sliding window, None where there is no mask.
    """

    ids: tuple[int, ...]
    hidden: torch.Tensor
    logits: torch.Tensor
    arguments: list[dict[str, Any]]
    mixing: list[dict[str, Any]] = field(default_factory=list)
    sight: list[int | None] = field(default_factory=list)


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
                hidden.append(_one_stream(model, x).clone())
            arguments[number] = {
                name: Handed.of(value, len(ids)) if isinstance(value, MutableMapping) else value
                for name, value in named.items()
            }
            hidden.extend(value.to(hidden[0].device) for value in _inputs(named, x).values())

        return act

    def keep_mixing(number: int, mixer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mixing[number] = passed_on(mixer, args, kwargs)

    with Hooks() as hooks:
        for number, layer in enumerate(model.modules.layers):
            hooks.before(layer, keep(number, layer), first=True)
            mixer = model.modules.attn(number)
            if model.modules.family.whole or runs_whole(mixer):
                hooks.before(mixer, partial(keep_mixing, number, mixer), first=True)
        # Not by `logits_to_keep`: of some models it cuts what the layers get.
        hooks.callback(model.modules.head.register_forward_pre_hook(_last_row).remove)
        logits = own_forward(model, torch.tensor([list(ids)]), use_cache=False).logits[0, -1].float()
    masks = {id(mask): mask for mask in (named.get("attention_mask") for named in arguments)}
    seen = {key: _sight(mask, len(ids)) for key, mask in masks.items()}
    sight = [seen[id(named.get("attention_mask"))] for named in arguments]
    return CleanRun(tuple(ids), torch.cat(hidden, -1), logits, arguments, mixing, sight)


def _last_row(head: nn.Module, args: tuple) -> tuple | None:
    return (args[0][..., -1:, :], *args[1:]) if args else None


def _inputs(named: dict[str, Any], hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of what a layer gets that which is of each token, [prompts, tokens, width], and no position's."""
    known = (*_DROPPED, *_BY_POSITION, *_BY_KEY)
    return {
        name: value
        for name, value in named.items()
        if name not in known
        and isinstance(value, torch.Tensor)
        and value.dim() == 3
        and value.shape[:2] == hidden.shape[:2]
        and value.dtype == hidden.dtype
    }


def input_columns(run: CleanRun) -> dict[tuple[int, str], slice]:
    """By layer and argument, where in a row of `CleanRun.hidden` that input lies, counted from the end of the state."""
    columns, first = {}, 0
    for layer, named in enumerate(run.arguments):
        for name, value in _inputs(named, run.hidden).items():
            columns[layer, name] = slice(first, first + value.shape[-1])
            first += value.shape[-1]
    return columns


def hands_on(run: CleanRun) -> bool:
    """Whether layers find something that earlier ones left, see `Handed`."""
    return any(isinstance(x, Handed) and x.shapes for named in run.arguments for x in named.values())


def split_inputs(run: CleanRun, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows [..., hidden + inputs] as `run` has them -> the states, and the inputs or None."""
    columns = input_columns(run)
    if not columns:
        return rows, None
    width = rows.shape[-1] - max(where.stop for where in columns.values())
    return rows[..., :width], rows[..., width:]


def _sight(mask: Any, length: int) -> int | None:
    """Of a mask [1, 1, tokens, tokens] over a prompt's own positions, see `CleanRun`."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return None
    lines, positions = mask.flatten(0, 1), torch.arange(length, device=mask.device)
    seen, back = (lines if mask.dtype == torch.bool else lines == 0), positions[:, None] - positions
    added = mask.dtype != torch.bool and bool((lines[~seen] > -1e4).any())
    if added or seen.shape[1:] != back.shape:
        return 0
    most = int(torch.where(seen, back, 0).max()) + 1
    return most if bool((seen == ((back >= 0) & (back < most))).all()) else 0


@at_rest
def layer_zero_input(
    model: EditableModel, ids: Sequence[int], copies: int, corrupt: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """[copies, tokens, hidden] entering layer 0, with inputs as `CleanRun.hidden`, when `corrupt` changes the embedding
    module's output."""
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


def _arguments(
    model: EditableModel, ids: Sequence[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[int | None]]:
    """What the layers get beside the hidden state: the same for all prompts of a length, so kept with the model."""
    kept = model.layer_arguments
    key = (model.modules.family, len(ids), model.dtype, tuple(str(device_of(layer)) for layer in model.modules.layers))
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
            run.sight,
        )
    return kept[key]


def _embedded(
    model: EditableModel, ids: list[list[int]], corrupt: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """[prompts, tokens, hidden], and inputs as in `CleanRun.hidden`; no layer computes."""
    entering = _entering(model, ids, corrupt, 1)
    if len(entering) > 1:
        entering = _entering(model, ids, corrupt, model.num_layers)
    return torch.cat(entering, -1) if len(entering) > 1 else entering[0]


def _entering(
    model: EditableModel,
    ids: list[list[int]],
    corrupt: Callable[[torch.Tensor], torch.Tensor] | None,
    depth: int,
) -> list[torch.Tensor]:
    """The state that enters layer 0 and the inputs of the first `depth` layers; the forward pass is stopped there."""
    entering: list[torch.Tensor] = []

    def look(number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        named = named_arguments(layer, args, kwargs)
        hidden = named.pop(next(iter(named)))
        if number == 0:
            entering.append(_one_stream(model, hidden))
        entering.extend(value.to(entering[0].device) for value in _inputs(named, hidden).values())
        if number == depth - 1:
            raise Stop

    with Hooks() as hooks:
        if corrupt is not None:
            hooks.behind(model.modules.embedding, corrupt)
        for number, layer in enumerate(model.modules.layers[:depth]):
            hooks.before(layer, partial(look, number, layer), first=True)
            if depth > 1:
                _pass_over(hooks, layer)
        own_forward(model, torch.tensor(ids), use_cache=False)
    return entering


def _pass_over(hooks: Hooks, layer: nn.Module) -> None:
    """The layer gives on what it gets."""
    before = vars(layer).get("forward")
    hooks.callback(vars(layer).pop, "forward") if before is None else hooks.callback(setattr, layer, "forward", before)
    layer.forward = lambda *args, **kwargs: next(iter(named_arguments(layer, args, kwargs).values()))


def _one_stream(model: EditableModel, hidden: torch.Tensor) -> torch.Tensor:
    if hidden.dim() != 3:
        raise UnsupportedModelError(
            f"{type(model.hf).__name__} (model_type '{model.modules.model_type}') feeds its layers "
            f"{list(hidden.shape)}: a sweep knows [prompts, tokens, hidden], one state a token"
        )
    return hidden


def differing(first: CleanRun, second: CleanRun) -> str | None:
    """The name of something that layers got in one run and not in the other, but for what is of each token, see
    `input_columns`; None: nothing."""
    own = [set(_inputs(named, first.hidden)) for named in first.arguments] + [set() for _ in first.mixing]
    runs = zip(own, first.arguments + first.mixing, second.arguments + second.mixing, strict=True)
    for inputs, one, other in runs:
        for name in {**one, **other}:
            if name not in (*_DROPPED, *inputs) and not _equal(one.get(name), other.get(name)):
                return name
    return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    # What layers fill themselves is not handed over, see `RowArguments.layer`; of objects nothing more is known.
    return type(one) is type(other) and (not isinstance(one, (bool, int, float, str)) or one == other)


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, (tuple, frozenset)) and any(map(_holds_tensor, value)))


class RowArguments:
    """Turns the arguments a layer got for whole prompts into those for packed rows of many prompts.

    runs: the prompts' clean runs; index: int64 [rows] of each row's position in the prompts laid end to end. inputs:
    [roots' rows, width], see `split_inputs`; origin: int64 [rows], which of these a row was copied from.
    """

    def __init__(
        self,
        runs: Sequence[CleanRun],
        index: torch.Tensor,
        inputs: torch.Tensor | None = None,
        origin: torch.Tensor | None = None,
    ) -> None:
        self.runs = runs
        self.index = index
        self.inputs, self.origin = inputs, origin
        self._columns = input_columns(runs[0]) if inputs is not None else {}
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

    def sight(self, layer: int) -> tuple[int, int | None]:
        """The longest prompt's length, and how far the mask that it came with lets tokens see, see `CleanRun`."""
        return len(self._longest.ids), self._longest.sight[layer]

    @cached_property
    def _longest(self) -> CleanRun:
        """What it is given by key position holds for the others too, but for what all keys are given alike."""
        return max(self.runs, key=lambda run: len(run.ids))

    @cached_property
    def _run_of_row(self) -> list[int]:
        ends = torch.tensor([len(run.ids) for run in self.runs]).cumsum(0)
        return torch.searchsorted(ends, self.index.cpu(), right=True).tolist()

    def handed(self, layer: int) -> dict[str, Handed]:
        """By argument what `layer` finds that earlier ones left it; behind the last nothing does."""
        named = self.runs[0].arguments[layer] if layer < len(self.runs[0].arguments) else {}
        return {name: value for name, value in named.items() if isinstance(value, Handed)}

    def layer(self, layer: int, rows: int, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of `layer` for the first `rows` rows, but for what is handed on."""
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
            elif (layer, name) in self._columns:
                origin = self.origin[:rows].to(self.inputs.device)
                named[name] = self.inputs[origin, self._columns[layer, name]].to(device)[None]
            elif isinstance(value, Handed):
                continue
            elif isinstance(value, MutableSequence):
                named[name] = type(value)()  # what layers hand each other there is of other rows
            elif _holds_tensor(value):
                raise UnsupportedModelError(
                    f"the model passes its layers a tensor '{name}' beside the states: a sweep does not know which "
                    "of its rows gets what"
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
