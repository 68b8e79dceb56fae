"""Edits that will be asked for one by one, computed together.

EasyEdit's `edit()` takes its requests one after the other and, unless told `sequential_edit`, puts the model back after
each: all of them edit the same model, so that the first one asked for can bring the others along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Plan:
    """requests: those to come. made: what was computed of them by place, for `settings` and for `weights`."""

    requests: Sequence[Mapping[str, Any]]
    made: dict[int, Any] = field(default_factory=dict)
    settings: Any = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def place(self, request: Mapping[str, Any]) -> int | None:
        return next((n for n, one in enumerate(self.requests) if one is request), None)

    def fits(self, settings: Any, weights: Mapping[str, torch.Tensor]) -> bool:
        if settings != self.settings or weights.keys() != self.weights.keys():
            return False
        return all(torch.equal(weight, self.weights[name]) for name, weight in weights.items())


_PLAN: ContextVar[Plan | None] = ContextVar("plan", default=None)


@contextmanager
def planned(requests: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Inside, each of `requests` (these very objects) will be asked for, all of the same model."""
    token = _PLAN.set(Plan(list(requests)))
    try:
        yield
    finally:
        _PLAN.reset(token)


def taken(
    request: Mapping[str, Any],
    settings: Any,
    weights: Mapping[str, torch.Tensor],
    make: Callable[[Sequence[Mapping[str, Any]]], Sequence[Any]],
) -> Any:
    """What `make` gives for `request`: computed with all that are planned, or by itself.

    settings, weights: what it depends on beside the request; where these differ from last time the plan was wrong (some
    of EasyEdit's methods do not put the model back), and requests are computed one by one from there on. A result is
    handed out once.
    """
    plan = _PLAN.get()
    if plan is not None and plan.weights and not plan.fits(settings, weights):
        plan.requests = ()
    place = None if plan is None else plan.place(request)
    if place is None:
        return make([request])[0]
    if place not in plan.made:
        left = range(place, len(plan.requests))
        plan.made = dict(zip(left, make([plan.requests[n] for n in left]), strict=True))
        plan.settings = settings
        plan.weights = {name: weight.detach().clone() for name, weight in weights.items()}
    return plan.made.pop(place)
