"""What the states behind the last layer say: final norm, head, logit scale and soft-cap, in this file alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops import target_logprob
from ..ops.logprob import Learned, log_sum_exp, log_sum_exp_with_mean
from ..ops.reference import compute_dtype
from .families import ModuleMap, UnsupportedModelError, on_device
from .load import EditableModel

HEAD_ROWS = 512  # rows of logits held at once
FEW_TOKENS = 1 << 13  # of a vocabulary

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
    def of(cls, modules: ModuleMap) -> LogitForm:
        """From a text model's config, as far as the class reads it: containers leave out what their text part does.

        Raises `UnsupportedModelError` for a factor that is no number above 0.
        """
        config, scales = modules.config, {"states": 1.0, "logits": 1.0}
        for name, (what, power) in (_SCALES | _SCALES_OF.get(config.model_type, {})).items():
            if name in modules.head_reads:
                scales[what] *= _number(config, name, 1.0) ** power
        caps = [_number(config, name, 0.0) for name in _SOFTCAPS if name in modules.head_reads]
        return cls(scales["states"], scales["logits"], max(caps, default=0.0))

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
    head, form = model.modules.head, LogitForm.of(model.modules)
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
    head, form = model.modules.head, LogitForm.of(model.modules)
    states = on_device(states, head)
    targets = targets.to(states.device)
    learning = torch.is_grad_enabled() and states.requires_grad
    if not _readable(head, form, states) or (learning and _few(head, states)):
        wide = targets.view(len(targets), -1)
        size = len(states) if states.requires_grad else HEAD_ROWS  # autograd would keep all parts
        parts = zip(states.split(max(1, size)), wide.split(max(1, size)), strict=True)
        return torch.cat([distribution(model, x).gather(-1, t) for x, t in parts]).view(targets.shape)
    states, bias = _scaled(head, form, states)
    if _learned_through(states, head):
        return Learned.apply(states, head.weight, bias, targets, form.softcap)
    return target_logprob(states, head.weight, bias, targets, form.softcap)


class Said(NamedTuple):
    """What rows say, for `divergence`: their states [rows, hidden], log sum exp of their logits [rows] and its gradient
    in the states [rows, hidden], the mean of the head's rows by their probability.

    The last two are None where logits are not linear in the states, or few.
    """

    states: torch.Tensor
    total: torch.Tensor | None
    mean: torch.Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, model: EditableModel, states: torch.Tensor) -> Said:
        """Of states behind the final norm."""
        head, form = model.modules.head, LogitForm.of(model.modules)
        states = on_device(states, head)
        if form.softcap or not _readable(head, form, states) or _few(head, states):
            return cls(states, None, None)
        scaled, bias = _scaled(head, form, states)
        total, mean = log_sum_exp_with_mean(scaled.to(compute_dtype(states.dtype)), head.weight, bias)
        return cls(states, total, mean * form.scale)

    def split(self, counts: Sequence[int]) -> list[Said]:
        """By rows, each part in memory of its own."""
        each = ([None] * len(counts) if x is None else [part.clone() for part in x.split(counts)] for x in self)
        return [Said(*parts) for parts in zip(*each, strict=True)]

    @classmethod
    def join(cls, parts: Sequence[Said]) -> Said:
        return cls(*(None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True)))


def divergence(model: EditableModel, before: Said, states: torch.Tensor) -> torch.Tensor:
    """KL(before | what states [rows, hidden] behind the final norm say) [rows]; differentiable in the states.

    Where logits are linear in the states, sum_v p(v) (log p(v) - log q(v)) is (states_p - states_q) . mean_p less
    the difference of the two log sum exp: no distribution is held.
    """
    head, form = model.modules.head, LogitForm.of(model.modules)
    states = on_device(states, head)
    if before.mean is None:
        old, new = distribution(model, before.states), distribution(model, states)
        return (old.exp() * (old - new)).sum(-1)
    states = states.to(before.total.dtype)  # once: gradients cancel, and are rounded at the end
    scaled, bias = _scaled(head, form, states)
    moved = before.states.to(states.dtype) - states
    return (moved * before.mean).sum(-1) + log_sum_exp(scaled, head.weight, bias) - before.total


def likeliest(model: EditableModel, states: torch.Tensor) -> torch.Tensor:
    """The likeliest token behind each of the states [rows, hidden]: int64 [rows], on the CPU."""
    return torch.cat([logits(model, part).argmax(-1).cpu() for part in states.split(HEAD_ROWS)])


@torch.no_grad()
def read_targets(
    model: EditableModel, states: torch.Tensor, places: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p(target) float32, the likeliest token in its place int64), [targets] each, on the CPU.

    states: [rows, hidden] behind the final norm; places: int64 [targets], the row that each target is read from.
    """
    logp, said = torch.empty(len(targets)), torch.empty(len(targets), dtype=torch.int64)
    order = torch.argsort(places, stable=True)
    for first in range(0, len(states), HEAD_ROWS):
        scores = logits(model, states[first : first + HEAD_ROWS])
        here = order[(places[order] >= first) & (places[order] < first + HEAD_ROWS)]
        at, wanted = (places[here] - first).to(scores.device), targets[here].to(scores.device)
        most, best = scores.max(-1, keepdim=True)
        wanted_logits = (scores[at, wanted] - most[at, 0]).cpu()
        logp[here] = (wanted_logits - scores.sub_(most).exp_().sum(-1).log()[at].cpu()).float()  # in place
        said[here] = best[at, 0].cpu()
    return logp, said


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
    return asking and not any(p.requires_grad for p in head.parameters())


def _readable(head: nn.Module, form: LogitForm, states: torch.Tensor) -> bool:
    """Whether logits can be told from the head's matrix, without losing what its own forward keeps."""
    return _plain(head, states) and _exact_factor(form.scale, states.dtype)


def _scaled(head: nn.Linear, form: LogitForm, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States and bias, with the factors of the logits in them."""
    if form.scale == 1.0:
        return states, head.bias
    return states * form.scale, None if head.bias is None else head.bias * form.logits_scale


def _few(head: nn.Linear, states: torch.Tensor) -> bool:
    """Is the vocabulary so small that autograd can as well keep all logits, in fewer steps?"""
    return states.dtype == compute_dtype(states.dtype) and head.out_features <= FEW_TOKENS


def _exact_factor(factor: float, dtype: torch.dtype) -> bool:
    """May states be multiplied by it? In half precision a power of two alone loses nothing."""
    return dtype == compute_dtype(dtype) or math.frexp(factor)[0] == 0.5
