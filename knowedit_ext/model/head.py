"""What the states behind the last layer say: final norm, head, logit scale and soft-cap, in this file alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..ops import target_logprob
from ..ops.logprob import Learned
from ..ops.reference import compute_dtype
from .families import UnsupportedModelError, on_device
from .load import EditableModel

HEAD_ROWS = 512  # rows of logits held at once

# How a ForCausalLM scales (read in transformers 5.24), by its config's name for the factor: what, and to which power.
_SCALES = {
    "logit_scale": ("logits", 1),  # Cohere
    "lm_head_multiplier": ("logits", 1),  # Falcon-H1
    "logits_scaling": ("logits", -1),  # Granite
    "logits_mup_width_multiplier": ("states", -1),  # Inkling
}
_SCALES_OF = {  # who means something else by the name
    "hyperclovax": {"logits_scaling": ("logits", 1)},
    "minicpm3": {"logits_scaling": ("states", -1)},
}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


@dataclass(frozen=True)
class LogitForm:
    """logits = cap(logits_scale * head(states_scale * states)) with cap(x) = softcap * tanh(x / softcap); 0: no cap."""

    states_scale: float = 1.0
    logits_scale: float = 1.0
    softcap: float = 0.0

    @classmethod
    def of(cls, config: Any) -> LogitForm:
        """From a text model's config. Raises `UnsupportedModelError` for a factor that is no number above 0."""
        scales = {"states": 1.0, "logits": 1.0}
        for name, (what, power) in (_SCALES | _SCALES_OF.get(config.model_type, {})).items():
            scales[what] *= _number(config, name, 1.0) ** power
        caps = [_number(config, name, 0.0) for name in _SOFTCAPS]
        return cls(scales["states"], scales["logits"], max(caps))

    @property
    def scale(self) -> float:
        return self.states_scale * self.logits_scale


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    if value is None or value == default:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise UnsupportedModelError(f"the config's {name} is {value!r}: expected a number above 0")
    return float(value)


def final_states(model: EditableModel, hidden: torch.Tensor) -> torch.Tensor:
    """Rows behind the last layer [rows, hidden] -> behind the final norm."""
    norm = model.modules.final_norm
    return norm(on_device(hidden, norm))


def logits(model: EditableModel, states: torch.Tensor) -> torch.Tensor:
    """[rows, vocab], float32 (float64 for float64), of states behind the final norm [rows, hidden]: the model's own."""
    head, form = model.modules.head, LogitForm.of(model.modules.config)
    states = on_device(states, head)
    if form.states_scale != 1.0:
        states = states * form.states_scale
    scores = head(states).to(compute_dtype(states.dtype))
    if form.logits_scale != 1.0:
        scores = scores * form.logits_scale
    return torch.tanh(scores / form.softcap) * form.softcap if form.softcap else scores


def distribution(model: EditableModel, states: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all tokens [rows, vocab]; differentiable."""
    return logits(model, states).log_softmax(-1)


def log_probabilities(model: EditableModel, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) behind states [rows, hidden]: targets, result [rows] or [rows, k]; differentiable.

    float32 (float64 for float64); [rows, vocab] is not held where the head is a plain matrix.
    """
    head, form = model.modules.head, LogitForm.of(model.modules.config)
    states = on_device(states, head)
    targets = targets.to(states.device)
    if not _plain(head, states) or not _exact_factor(form.scale, states.dtype):
        wide = targets.view(len(targets), -1)
        size = len(states) if states.requires_grad else HEAD_ROWS  # autograd would keep all parts
        parts = zip(states.split(max(1, size)), wide.split(max(1, size)), strict=True)
        return torch.cat([distribution(model, x).gather(-1, t) for x, t in parts]).view(targets.shape)
    bias = head.bias
    if form.scale != 1.0:
        states = states * form.scale
        bias = None if bias is None else bias * form.logits_scale
    if _learned_through(states, head):
        return Learned.apply(states, head.weight, bias, targets, form.softcap)
    return target_logprob(states, head.weight, bias, targets, form.softcap)


def likeliest(model: EditableModel, states: torch.Tensor) -> torch.Tensor:
    """The likeliest token behind each of the states [rows, hidden]: int64 [rows], on the CPU."""
    return torch.cat([logits(model, part).argmax(-1).cpu() for part in states.split(HEAD_ROWS)])


@torch.no_grad()
def read_targets(
    model: EditableModel, states: torch.Tensor, places: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p(target) float32, whether the target was the likeliest), [targets] each, on the CPU.

    states: [rows, hidden] behind the final norm; places: int64 [targets], the row that each target is read from.
    """
    logp, right = torch.empty(len(targets)), torch.empty(len(targets), dtype=torch.bool)
    order = torch.argsort(places, stable=True)
    for first in range(0, len(states), HEAD_ROWS):
        scores = logits(model, states[first : first + HEAD_ROWS])
        here = order[(places[order] >= first) & (places[order] < first + HEAD_ROWS)]
        at, wanted = (places[here] - first).to(scores.device), targets[here].to(scores.device)
        most, best = scores.max(-1, keepdim=True)
        wanted_logits = (scores[at, wanted] - most[at, 0]).cpu()
        logp[here] = (wanted_logits - scores.sub_(most).exp_().sum(-1).log()[at].cpu()).float()  # in place
        right[here] = (best[at, 0] == wanted).cpu()
    return logp, right


def _plain(head: nn.Module, states: torch.Tensor) -> bool:
    """A matrix that can be read as it is: not offloaded, quantised, adapted or in another precision."""
    weight = getattr(head, "weight", None)
    return (
        type(head) is nn.Linear
        and getattr(head, "_hf_hook", None) is None
        and type(weight) is nn.Parameter
        and weight.dtype == states.dtype
    )


def _learned_through(states: torch.Tensor, head: nn.Linear) -> bool:
    """Do gradients go to the states alone? The op would compute the logits twice more for its backward pass."""
    asking = torch.is_grad_enabled() and states.requires_grad
    exact = states.dtype == compute_dtype(states.dtype)
    return asking and exact and not any(p.requires_grad for p in head.parameters())


def _exact_factor(factor: float, dtype: torch.dtype) -> bool:
    """May states be multiplied by it? In half precision a power of two alone loses nothing."""
    return dtype == compute_dtype(dtype) or math.frexp(factor)[0] == 0.5
