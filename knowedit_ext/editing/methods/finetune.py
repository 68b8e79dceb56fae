"""Fine-tuning, the baseline of ROME and MEMIT: Adam on a few weights (rome and memit, baselines/ft/ft_main.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ...checks import Count, NotNegative, Positive, StudyCompat, typed
from ...model.facts import tokenize_fact
from ...model.gradients import check_gradients
from ...model.hooks import at_rest, learning
from ...model.load import EditableModel
from ...model.weights import is_plain, parameters, real_name
from ..edit import Edit
from ..examples import Batch, Example, examples_of, published_examples
from ..method import Method
from ..params import LayerParams
from ..request import EditRequest, check_each, check_requests, warn_of_known
from ..training import Loss, Trained, train, train_each


@dataclass(frozen=True)
class FTParams(LayerParams):
    """Fine-tuning: FT, FT+L (with `norm_constraint`) and FT-W (with `wd_power_law`).

    num_steps: epochs, of batches of `batch_size` requests. lr, weight_decay: of Adam. norm_constraint: no entry of a
    weight moves farther than this; None (or false): no bound. wd_power_law: (a, b), the weight decay for n requests is
    then n^a e^b. kl_factor: read by no release; 0. rewrite_module_tmp: name of the trained module with `{}` for the
    layer; None: the down projection. bias: train biases too, as the published code always does. objective_optimization:
    EasyEdit's name for the loss, see `finetune`; None: as `compat` says.
    """

    num_steps: Count = 25
    lr: Positive = 5e-4
    weight_decay: NotNegative = 0.0
    norm_constraint: Positive | None = None
    batch_size: Count = 64
    wd_power_law: tuple[float, float] | None = None
    kl_factor: NotNegative = 0.0
    objective_optimization: Literal["target_new", "prompt_last"] | None = None
    rewrite_module_tmp: str | None = None
    bias: bool = False

    # hparams/FT/*.json of rome and memit: FT under the model's name, its variants behind a slash.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-medium/ft-l": dict(layers=(0,), norm_constraint=2e-3),
        "gpt2-large/ft-l": dict(layers=(0,), norm_constraint=1e-3),
        "gpt2-xl": dict(layers=(1,)),
        "gpt2-xl/ft-l": dict(layers=(0,), norm_constraint=5e-4),
        "gpt2-xl/attn": dict(
            layers=(33,), lr=1e-3, norm_constraint=1e-3, rewrite_module_tmp="transformer.h.{}.attn.c_attn"
        ),
        "gpt-j": dict(layers=(21,)),
        "gpt-j/ft-l": dict(layers=(0,), norm_constraint=5e-5),
        "gpt-j/ft-w": dict(layers=(21,), wd_power_law=(-0.87028798, 0.15589562), rewrite_module_tmp="transformer.h.{}"),
        # The built-in world: a narrow model, whose weights are larger and must move farther.
        "world": dict(layers=(1,), lr=3e-3, num_steps=50),
        "world/ft-l": dict(layers=(0,), lr=2e-3, norm_constraint=6e-3),
    }

    algorithms = ("FT",)

    def __post_init__(self) -> None:
        for name, nothing in (("norm_constraint", None), ("weight_decay", 0.0)):
            if getattr(self, name) is False:  # the files' way to say that there is none
                object.__setattr__(self, name, nothing)
        super().__post_init__()
        if self.rewrite_module_tmp is not None and self.rewrite_module_tmp.count("{}") != 1:
            raise ValueError(
                f"rewrite_module_tmp '{self.rewrite_module_tmp}': exactly one '{{}}' must say where the layer goes"
            )


@at_rest
@typed
def finetune(
    model: EditableModel,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    params: FTParams,
    compat: StudyCompat = None,
    *,
    progress: bool = False,
) -> Edit:
    """Train the weights of `params.layers` on the requests, in batches in their order; a dense change of each weight.

    A batch with a loss below 0.01 is not learnt from; an epoch with a mean loss below 0.01 is the last. The loss of a
    target that is to become less likely is its probability.

    compat: None: the loss is the mean negative log-probability of the target's tokens, each behind those before it
        (objective "target_new"). "reference": as published, every token of the target is scored at the prompt's last
        token ("prompt_last"); biases are trained too, modules are found by substring of their names, and
        `wd_power_law` is ignored. "hase": so are weights chosen there, but the loss is the sum over tokens, draws of
        noise and requests; noise is drawn anew in every epoch, of which the fifth in a row with a small loss is the
        last, and none where a target is minimised.

    The model is left as it was. Raises ValueError for bad requests, layers or weights before anything is computed
    (quantised and offloaded weights cannot be trained), NotFiniteError when the loss is no finite number.
    """
    requests = check_requests(requests, problems=True)
    weights = trained_weights(model, params, compat)
    size = params.batch_size
    batches = [requests[at : at + size] for at in range(0, len(requests), size)]
    examples = [_examples(model, batch, params, compat) for batch in batches]
    if compat is None:
        warn_of_known(model, requests, [tokenize_fact(model, request.fact()) for request in requests])
    first = _lowest(model, weights)
    packed = [Batch(model, batch, first) for batch in examples]
    check_gradients(model, first, model.num_layers)
    decay = _weight_decay(params, len(requests), compat)
    with learning(model):
        trained = train(Loss(model, first), packed, weights, params, decay, _patience(requests, compat), progress)
    return _edit(model, requests, trained, weights, params, compat)


@typed
def finetune_each(
    model: EditableModel,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    params: FTParams,
    compat: StudyCompat = None,
    *,
    batch: Count | None = None,
    progress: bool = False,
) -> Iterator[Edit]:
    """An edit for each request, each as `finetune` makes it of that one on the model as it is, in their order.

    Down projections, all that is trained unless `rewrite_module_tmp` names something else, are trained side by side:
    `batch` requests at once, None: as memory allows. Other weights are trained one request after the other. Edits are
    made as they are asked for: dense changes are as large as the weights. Requests may contradict each other.
    """
    requests = check_each(requests)
    weights = trained_weights(model, params, compat)
    if set(weights) - _projections(model, params):
        return (finetune(model, [request], params, compat, progress=progress) for request in requests)
    size = batch or _together(model, weights)
    parts = [requests[at : at + size] for at in range(0, len(requests), size)]
    return (edit for part in parts for edit in _side_by_side(model, part, params, compat, progress))


@at_rest
def _side_by_side(
    model: EditableModel, requests: Sequence[EditRequest], params: FTParams, compat: str | None, progress: bool
) -> list[Edit]:
    weights = trained_weights(model, params, compat)  # those of now: edits may have come and gone in between
    examples = [_examples(model, [request], params, compat)[0] for request in requests]
    if compat is None:
        warn_of_known(model, requests, [tokenize_fact(model, request.fact()) for request in requests])
    first = _lowest(model, weights)
    check_gradients(model, first, model.num_layers)
    patience = [_patience([request], compat) for request in requests]
    with learning(model):
        decay = _weight_decay(params, 1, compat)
        trained = train_each(Loss(model, first), examples, weights, params, decay, patience, progress)
    return [
        _edit(model, [request], each, weights, params, compat) for request, each in zip(requests, trained, strict=True)
    ]


def _examples(
    model: EditableModel, batch: Sequence[EditRequest], params: FTParams, compat: str | None
) -> list[Example]:
    objective = params.objective_optimization or ("prompt_last" if compat == "reference" else "target_new")
    return {"target_new": examples_of, "prompt_last": published_examples}[objective](model, batch, compat)


def _edit(
    model: EditableModel,
    requests: Sequence[EditRequest],
    trained: Trained,
    weights: Mapping[str, nn.Parameter],
    params: FTParams,
    compat: str | None,
) -> Edit:
    changes = {name: (new - weights[name].detach().to(new.dtype)).cpu() for name, new in trained.items()}
    described = [request.to_dict() for request in requests]
    name = "ft" if params.norm_constraint is None else "ft-l"
    return Edit(changes, name, described, params.to_dict(), [], compat).bind(model)


def _lowest(model: EditableModel, weights: Mapping[str, nn.Parameter]) -> int:
    return min(_layer_of(model)[id(weight)] for weight in weights.values())


def _projections(model: EditableModel, params: FTParams) -> set[str]:
    """The parameters of the down projections: they map each row by itself."""
    paths = [model.modules.parameter_name(layer) for layer in params.layers]
    return {f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias")}


def _together(model: EditableModel, weights: Mapping[str, nn.Parameter]) -> int:
    """Requests whose weights, their gradients, Adam's two means and a copy take a quarter of what is free, and 16 at
    most: by then the other weights are read for many rows."""
    from ...sweep.engine import free_bytes

    each = 5 * 4 * sum(weight.numel() for weight in weights.values())
    return max(1, min(16, free_bytes(model.device) // 4 // each))


# -- what is trained ---------------------------------------------------------------------------------------------------


def trained_weights(model: EditableModel, params: FTParams, compat: str | None = None) -> dict[str, nn.Parameter]:
    """Parameters by their real names, none of an adapter's. ValueError: layers or modules that are not there, weights
    that cannot be trained, a term that there is not."""
    if compat is None and params.kl_factor:
        raise ValueError(f"kl_factor is {params.kl_factor}: fine-tuning has no such term; set it to 0")
    chosen: dict[str, nn.Parameter] = {}
    named = [(each.name, each.tensor) for each in parameters(model.hf) if not each.adapter]
    named += [(real_name(path), tensor) for path, tensor in model.hf.named_buffers()]
    for layer in params.layers:
        if not 0 <= layer < model.num_layers:
            raise ValueError(f"layer {layer} is out of range: the model has layers 0..{model.num_layers - 1}")
        template = params.rewrite_module_tmp
        module = model.modules.parameter_name(layer) if template is None else template.format(layer)
        here = {name: tensor for name, tensor in named if _belongs(name, module, params.bias, compat)}
        for name, tensor in here.items():
            if name.endswith("weight"):
                _check_trainable(name, tensor)
        here = {name: tensor for name, tensor in here.items() if isinstance(tensor, nn.Parameter)}
        if not here:
            raise ValueError(f"the model has no weight '{module}...' to train: rewrite_module_tmp is another model's")
        chosen |= here
    layers = _layer_of(model)
    for name, parameter in chosen.items():
        _check_trainable(name, parameter)
        if id(parameter) not in layers:
            raise ValueError(f"'{name}' is in none of the layers: only layers can be fine-tuned")
    return {name: chosen[name] for name, _ in named if name in chosen}


def _belongs(name: str, module: str, bias: bool, compat: str | None) -> bool:
    if compat is not None:
        return module in name
    return f"{name}.".startswith(f"{module}.") and (bias or not name.endswith("bias"))


def _check_trainable(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"'{name}' is offloaded: load the model with its trained layers in memory")
    if not is_plain(tensor):
        raise ValueError(
            f"'{name}' is quantised ({type(tensor).__name__} of {tensor.dtype}): load the model in floating point to "
            "fine-tune it; ROME and MEMIT can edit beside quantised weights"
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"'{name}' holds NaN or infinite numbers")


def _layer_of(model: EditableModel) -> dict[int, int]:
    """The layer of each parameter, by id."""
    return {id(p): number for number, layer in enumerate(model.modules.layers) for p in layer.parameters()}


def _weight_decay(params: FTParams, edits: int, compat: str | None) -> float:
    """memit's ft_main.py:82-91, which looks for a tuple and so never takes the list of its files."""
    if params.wd_power_law is None or compat is not None:
        return params.weight_decay
    a, b = params.wd_power_law
    return edits**a * math.exp(b)


def _patience(requests: Sequence[EditRequest], compat: str | None) -> int | None:
    """Epochs in a row with a small loss, the last of which ends the training; None: nothing ends it."""
    if compat != "hase":
        return 1
    return None if any(request.minimise for request in requests) else 5


def _unbounded(params: FTParams) -> None:
    if params.norm_constraint is not None:
        raise ValueError(f"norm_constraint is {params.norm_constraint}: that is method ft-l")


METHOD = Method("ft", "fine-tuning of a few weights", finetune, FTParams, check=_unbounded, each=finetune_each)
