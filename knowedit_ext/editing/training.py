"""Adam on a few weights of a model that is itself left alone: one training, or many side by side.

What lies below the lowest trained layer never changes: it is computed once. From there on, rows without padding go
through the model's own layers, and the head sees the scored ones. The model's parameters are never written: copies
stand in their place during a pass, in float32 where the model is in a lower precision.

Trainings side by side share each pass: in the trained projections every request's rows meet weights of their own, in
all else the same ones, which are read once for all of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

from ..model.errors import NotFiniteError
from ..model.head import final_states, log_probabilities
from ..model.hooks import Hooks
from ..model.load import EditableModel
from ..model.weights import Weight, find_weight, parameters
from .examples import Batch, Example

logger = logging.getLogger(__name__)

STOP_LOSS = 1e-2

Trained = dict[str, torch.Tensor]  # weights by their names, in float32 at least


class Settings(Protocol):
    """What `FTParams` says of a training."""

    num_steps: int
    lr: float
    norm_constraint: float | None


class Loss(nn.Module):
    """A batch's losses, one an example; a module, so that `functional_call` can put other weights in the place of the
    model's."""

    def __init__(self, model: EditableModel, first: int) -> None:
        super().__init__()
        self.hf, self.model, self.first = model.hf, model, first
        self.paths = {each.name: f"hf.{each.path}" for each in parameters(model.hf)}

    def forward(self, batch: Batch) -> torch.Tensor:
        hidden = batch.packed.run(batch.hidden, self.first, self.model.num_layers)
        states = final_states(self.model, hidden[batch.rows.to(hidden.device)])
        logp = log_probabilities(self.model, states, batch.targets)  # [rows, k]
        rows = -(logp * batch.weights.to(logp)).sum(1)
        nll = rows.new_zeros(len(batch.shares)).index_add(0, batch.run_of_row.to(rows.device), rows)  # [runs]
        losses = torch.where(batch.minimise.to(nll.device), (-nll).exp(), nll) * batch.shares.to(nll)
        return losses.new_zeros(batch.size).index_add(0, batch.example_of_run.to(losses.device), losses)


def train(
    loss_of: Loss,
    batches: Sequence[Batch],
    weights: Mapping[str, nn.Parameter],
    params: Settings,
    weight_decay: float,
    patience: int | None,
    progress: bool,
) -> Trained:
    """One training, a step a batch. patience: epochs in a row with a small mean loss, the last of which ends it."""
    trained = _copies(weights)
    optimiser = torch.optim.Adam(trained.values(), lr=params.lr, weight_decay=weight_decay)
    requests, small = sum(batch.size for batch in batches), 0
    for epoch in tqdm(range(params.num_steps), desc="fine-tuning", unit="epoch", disable=not progress):
        total = 0.0
        for batch in batches:
            if epoch and batch.redrawn:
                batch.refresh()
            used = {loss_of.paths[name]: tensor.to(weights[name].dtype) for name, tensor in trained.items()}
            loss = functional_call(loss_of, used, (batch,)).sum()
            value = loss.item()
            _check_loss(value, epoch, params)
            total += value * batch.size
            if value >= STOP_LOSS:
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            _clamp(trained, weights, params.norm_constraint)
        mean = total / requests
        logger.debug("epoch %d: mean loss %.4f", epoch, mean)
        small = small + 1 if mean < STOP_LOSS else 0
        if patience is not None and small >= patience:
            break
    logger.info("fine-tuned %d requests in %d epochs to a mean loss of %.4f", requests, epoch + 1, mean)
    return _finished(trained, params)


def train_each(
    loss_of: Loss,
    examples: Sequence[Example],
    weights: Mapping[str, nn.Parameter],
    params: Settings,
    weight_decay: float,
    patience: Sequence[int | None],
    progress: bool,
) -> list[Trained]:
    """A training for each example, which is its only batch. weights: of projections that map each row by itself."""
    trained = [_copies(weights) for _ in examples]
    optimiser = torch.optim.Adam(
        [t for each in trained for t in each.values()], lr=params.lr, weight_decay=weight_decay
    )
    found = {name: find_weight(loss_of.hf, name) for name in weights if name.endswith("weight")}
    small, left, batch = [0] * len(examples), list(range(len(examples))), None
    for epoch in tqdm(range(params.num_steps), desc="fine-tuning", unit="epoch", disable=not progress):
        if batch is None or batch.size > len(left):  # those that are done have left
            batch = Batch(loss_of.model, [examples[n] for n in left], loss_of.first)
        elif batch.redrawn:
            batch.refresh()
        with _own_weights(found, weights, [trained[n] for n in left], batch.spans()):
            losses = loss_of(batch)
        values = losses.tolist()
        for value in values:
            _check_loss(value, epoch, params)
        learning = [at for at, value in enumerate(values) if value >= STOP_LOSS]
        optimiser.zero_grad()
        if learning:
            losses[learning].sum().backward()
            for n in set(range(len(examples))) - {left[at] for at in learning}:
                for tensor in trained[n].values():
                    tensor.grad = None  # a gradient of nought would still be moved by Adam's momentum
            optimiser.step()
        for n, value in zip(left, values, strict=True):
            _clamp(trained[n], weights, params.norm_constraint)
            small[n] = small[n] + 1 if value < STOP_LOSS else 0
        left = [n for n in left if patience[n] is None or small[n] < patience[n]]
        if not left:
            break
    logger.info("fine-tuned %d requests, each alone, in %d epochs at most", len(examples), epoch + 1)
    return [_finished(each, params) for each in trained]


def _own_weights(
    found: Mapping[str, Weight],
    weights: Mapping[str, nn.Parameter],
    trained: Sequence[Trained],
    spans: Sequence[tuple[int, int]],
) -> Hooks:
    """Rows of each span meet weights of their own in the trained projections."""
    hooks = Hooks()
    for name, weight in found.items():
        bias = name.removesuffix("weight") + "bias"
        pairs = []
        for each in trained:
            used = {leaf: each[leaf].to(weights[leaf].dtype) for leaf in (name, bias) if leaf in each}
            matrix = used[name].T if weight.input_first else used[name]
            pairs.append((matrix, used.get(bias, getattr(weight.holder, "bias", None))))
        hooks.callback(weight.holder.register_forward_hook(_instead(pairs, spans), prepend=True).remove)
    return hooks


def _instead(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor | None]], spans: Sequence[tuple[int, int]]
) -> Callable[[nn.Module, tuple, torch.Tensor], torch.Tensor]:
    def act(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        rows = args[0].reshape(-1, args[0].shape[-1])
        parts = [
            nn.functional.linear(rows[start:stop], *pair) for pair, (start, stop) in zip(pairs, spans, strict=True)
        ]
        return torch.cat(parts).reshape(output.shape)

    return act


def _copies(weights: Mapping[str, nn.Parameter]) -> Trained:
    """In float32 at least, asking for gradients."""
    return {
        name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True).requires_grad_()
        for name, weight in weights.items()
    }


def _check_loss(value: float, epoch: int, params: Settings) -> None:
    if not math.isfinite(value):
        raise NotFiniteError(f"the loss is {value} in epoch {epoch}: try a lower lr than {params.lr}")


@torch.no_grad()
def _clamp(trained: Trained, weights: Mapping[str, nn.Parameter], most: float | None) -> None:
    """Every entry back to within `most` of what it was: the L-infinity ball of FT+L. None: no bound."""
    for name, tensor in trained.items() if most is not None else ():
        before = weights[name].to(tensor.dtype)
        tensor.clamp_(before - most, before + most)


def _finished(trained: Trained, params: Settings) -> Trained:
    for name, tensor in trained.items():  # the last step is followed by no loss
        if not torch.isfinite(tensor).all():
            raise NotFiniteError(f"'{name}' came to hold NaN or infinite numbers: try a lower lr than {params.lr}")
    return {name: tensor.detach() for name, tensor in trained.items()}
