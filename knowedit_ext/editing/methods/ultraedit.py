"""UltraEdit: no subject, no value optimised, one backward pass (Gu et al. 2025; XiaojieGu/UltraEdit).

At each token from which a token of the answer is read, an edited module reads h and puts out what the loss has the
gradient g of. Both are normalised by what was seen so far, V = -lr |h^|^2 g^, and the change is the closed form with
nothing but its own size against it: dW^T = H (H^T H + I)^-1 V^T.

The gradients' scale drops out by the normalisation; so the loss here is the sum over tokens, and how requests are
batched makes no difference. compat="reference" does as released: gradients of the mean over a mini-batch, one
normaliser for all modules of one shape, and a variance that takes m for m - 1 in each mini-batch of m tokens. (A
mini-batch of one token makes the released one NaN for good: that is refused.) The release's own changes, recorded in
float32 for a GPT-2 of 6 layers, lr 1e-4 and 2 x 8 edits in mini-batches of 4, are 2e-6 to 9e-6 from ours then, in
relative Frobenius distance, and 0.4 to 0.9 from the mended ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ...checks import Compat, Count, Natural, Positive, as_type, quoted, typed
from ...model.facts import TokenizedFact, tokenize_fact
from ...model.gradients import check_gradients
from ...model.head import final_states, log_probabilities
from ...model.hooks import at_rest, learning
from ...model.load import EditableModel
from ...model.weights import find_weight
from ...sweep.capture import clean_runs
from ...sweep.engine import default_max_rows
from ...sweep.module_rows import Rows, module_rows
from ...sweep.packed import PackedPrompts, parts_of
from ..changes import LowRank
from ..edit import Edit, weight_is_input_first
from ..history import earlier_edits
from ..method import Method
from ..metric import Plain
from ..params import LayerParams
from ..request import EditRequest, check_requests, warn_of_known
from ..running import Running

EPSILON = torch.finfo(torch.float32).eps


def _modules(name: str, layers: Iterable[int], base: str = "model") -> tuple[str, ...]:
    return tuple(f"{base}.layers.{layer}.mlp.{name}" for layer in layers)


_GEMMA3 = dict(base="model.language_model", layers=range(52, 61))


@dataclass(frozen=True)
class UltraEditParams(LayerParams):
    """lr: length of the step. inner_params: names of the edited modules, linear maps within layers; none: the down
    projections of `layers`. token: "ans": tokens that an answer's tokens are read from; "mask": all of the prompt's.
    batch_size_once: requests of a mini-batch, which matters for compat="reference" alone.
    """

    layers: tuple[Natural, ...] = ()
    inner_params: tuple[str, ...] = ()
    lr: Positive = 1e-6
    token: Literal["ans", "mask"] = "ans"
    batch_size_once: Count = 10

    algorithms = ("ULTRAEDIT",)
    other = frozenset(
        """model_class class_name tokenizer_class tokenizer_name dropout no_grad_layers editor_batch_size silent half
        results_dir""".split()
    )

    # UltraEdit, run.sh and config/; EasyEdit, hparams/UltraEdit/*.yaml
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt-j": dict(layers=tuple(range(18, 27))),
        "mistral-7b": dict(layers=(29, 30)),
        "phi-4": dict(layers=tuple(range(30, 39))),
        "llama-3-8b": dict(inner_params=_modules("gate_proj", range(11, 16)) + _modules("up_proj", range(18, 25))),
        "qwen2.5-7b": dict(inner_params=_modules("gate_proj", range(18, 27)) + _modules("up_proj", range(18, 27))),
        "gemma-3-27b": dict(inner_params=_modules("gate_proj", **_GEMMA3) + _modules("up_proj", **_GEMMA3)),
        "world": dict(layers=(2, 3, 4), lr=2e-3),
    }

    def __post_init__(self) -> None:
        if self.inner_params:
            names = as_type("inner_params", self.inner_params, tuple[str, ...])
            numbers = [re.findall(r"\.(\d+)\.", name) for name in names]
            for name, digits in zip(names, numbers, strict=True):
                if len(digits) != 1:
                    raise ValueError(f"inner_params name {quoted(name)}: expected a module of one layer")
            layers = tuple(sorted({int(digits[0]) for digits in numbers}))
            if self.layers and tuple(self.layers) != layers:
                raise ValueError(f"layers are {list(self.layers)}, but inner_params are of layers {list(layers)}")
            object.__setattr__(self, "layers", layers)
        super().__post_init__()


@at_rest
@typed
def ultraedit(
    model: EditableModel,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    params: UltraEditParams,
    *,
    compat: Compat = None,
    earlier: Iterable[Edit] = (),
) -> Edit:
    """Many facts, a change of each of `params.inner_params` or the down projections of `params.layers`.

    earlier: UltraEdit's edits before this one, whose statistics go on (`Edit.statistics`); apply them first.

    The model is left as it was. Raises ValueError for bad requests, layers or modules, for earlier edits without
    statistics of a module, and where one token is all that was ever seen: nothing can be normalised by that.
    """
    requests = check_requests(requests)
    modules = _edited(model, params)
    before = _statistics(model, earlier, modules)
    facts = [tokenize_fact(model, request.fact()) for request in requests]
    warn_of_known(model, requests, facts)
    batches = list(_observed(model, facts, modules, params, compat))
    kept = {name: Running.join(_part(rows[name], compat) for rows in batches) for name in modules}
    edit = Edit({}, METHOD.name, [r.to_dict() for r in requests], params.to_dict(), [], compat)
    edit.statistics = {name: part.tensor() for name, part in kept.items()}
    together = {name: [*before[name], kept[name]] for name in modules}
    shapes = {name: batches[0][name][0].shape[1:] + batches[0][name][1].shape[1:] for name in modules}
    for number, (name, module) in enumerate(modules.items()):
        same = [name] if compat is None else [other for other in modules if shapes[other] == shapes[name]]
        normal = Running.join(part for other in same for part in together[other])
        keys, gradients = (torch.cat([rows[name][n] for rows in batches]).double() for n in (0, 1))
        read, wanted = _normalised(torch.cat([keys, gradients], 1), normal, compat).split(
            [keys.shape[1], gradients.shape[1]], 1
        )
        values = -params.lr * read.square().sum(1, keepdim=True) * wanted  # [tokens, d_out]
        inputs = Plain().solve(number, keys.T, [])
        change = LowRank(inputs.cpu(), values.T.contiguous().cpu(), weight_is_input_first(module))
        edit.changes[f"{name}.weight"] = change
    return edit.bind(model)


def _edited(model: EditableModel, params: UltraEditParams) -> dict[str, nn.Module]:
    for layer in params.layers:
        if not 0 <= layer < model.num_layers:
            raise ValueError(f"layer {layer} is out of range: the model has layers 0..{model.num_layers - 1}")
    if not params.inner_params:
        modules = {model.modules.parameter_name(n): model.modules.down_projection(n) for n in params.layers}
    else:
        modules = {}
        for name in params.inner_params:
            try:
                modules[name] = model.hf.get_submodule(name)
            except AttributeError as error:
                raise ValueError(f"the model has no module {quoted(name)}: inner_params are another model's") from error
    for name in modules:
        parameter = find_weight(model.hf, f"{name}.weight").parameter  # None: quantised
        if parameter is not None and (parameter.dim() != 2 or not torch.isfinite(parameter).all()):
            raise ValueError(f"'{name}.weight' is no matrix of finite numbers")
    return modules


def _statistics(
    model: EditableModel, earlier: Iterable[Edit], modules: Mapping[str, nn.Module]
) -> dict[str, list[Running]]:
    statistics: dict[str, list[Running]] = {name: [] for name in modules}
    for number, edit in enumerate(earlier_edits(model, earlier)):
        for name, parts in statistics.items():
            seen, width = edit.statistics.get(name), sum(find_weight(model.hf, f"{name}.weight").shape)
            if seen is None:
                raise ValueError(f"earlier[{number}] ({edit.method or 'an edit'}) keeps no statistics of '{name}'")
            if seen.shape != (3, width) or not torch.isfinite(seen).all():
                raise ValueError(
                    f"earlier[{number}]: statistics of '{name}' are {list(seen.shape)}, expected [3, {width}], finite"
                )
            parts.append(Running.from_tensor(seen))
    return statistics


def _part(rows: tuple[torch.Tensor, torch.Tensor], compat: str | None) -> Running:
    part = Running.of(torch.cat(rows, 1))
    if compat is None:
        return part
    if part.count == 1:
        raise ValueError("a mini-batch of one token makes the released normaliser NaN for good: use compat=None")
    return Running(part.count, part.mean, part.squares * part.count / (part.count - 1))


def _normalised(rows: torch.Tensor, normal: Running, compat: str | None) -> torch.Tensor:
    if normal.count == 1:
        raise ValueError("one token is all that UltraEdit has seen, and nothing to normalise by: give more requests")
    mean, squares = normal.mean.to(rows.device), normal.squares.to(rows.device)
    if compat is None:
        spread = (squares / (normal.count - 1)).sqrt()
        return torch.where(spread > EPSILON * mean.abs(), (rows - mean) / spread, 0.0)  # 0: always the same
    return (rows - mean) / ((squares / (normal.count - 1 + EPSILON)).sqrt() + EPSILON)


def _observed(
    model: EditableModel,
    facts: Sequence[TokenizedFact],
    modules: Mapping[str, nn.Module],
    params: UltraEditParams,
    compat: str | None,
) -> Iterator[Rows]:
    """By module, of some requests each time: (what it reads [tokens, d_in], the loss's gradient [tokens, d_out])."""
    ids = [fact.ids + fact.target_ids[:-1] for fact in facts]
    order = list(range(len(facts)))
    if compat is None:
        parts = [order[part] for part in parts_of([len(each) for each in ids], default_max_rows(model))]
    else:  # the longest first, see data/base.py
        order.sort(key=lambda n: -len(ids[n]))
        size = params.batch_size_once
        parts = [order[first : first + size] for first in range(0, len(order), size)]
    first = params.layers[0]
    check_gradients(model, first, model.num_layers)
    with learning(model):
        for part in parts:
            packed = PackedPrompts(model, clean_runs(model, [ids[n] for n in part]))
            scored = [
                (packed.row(place, len(facts[n].ids) - 1 + token), target)
                for place, n in enumerate(part)
                for token, target in enumerate(facts[n].target_ids)
            ]
            rows, targets = (torch.tensor(each) for each in zip(*scored, strict=True))
            kept = rows if params.token == "ans" else torch.arange(packed.rows)
            yield _pass(model, packed, modules, first, rows, targets, kept, mean=compat is not None)


def _pass(
    model: EditableModel,
    packed: PackedPrompts,
    modules: Mapping[str, nn.Module],
    first: int,
    rows: torch.Tensor,
    targets: torch.Tensor,
    kept: torch.Tensor,
    mean: bool,
) -> Rows:
    def loss(hidden: torch.Tensor) -> torch.Tensor:
        logp = log_probabilities(model, final_states(model, hidden[rows.to(hidden.device)]), targets)
        return -(logp.mean() if mean else logp.sum())

    with torch.no_grad():
        hidden = packed.run(packed.start, 0, first)
    return module_rows(packed, hidden, first, modules, loss, kept)[1]


METHOD = Method(
    "ultraedit", "UltraEdit: one backward pass, no subject, no value", ultraedit, UltraEditParams, many=True
)
