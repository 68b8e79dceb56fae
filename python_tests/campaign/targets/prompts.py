"""Facts, requests and their texts: constructors, tokens, and what is computed from them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import torch

import knowedit_ext as ke
from knowedit_ext.editing.methods import METHODS

from .. import mutations, subjects
from ..outcome import Case


def prompts(random: Random, folder: Path) -> Case:
    """A `Fact` of odd texts, traced."""
    given = _texts(random, subjects.FACT)
    family = random.choice(("gpt2", "llama"))

    def call() -> tuple[ke.Fact, ke.Trace]:
        fact = ke.Fact(**given)
        return fact, ke.trace(subjects.model(family), fact, samples=1, window=2, kind=random.choice(("state", "mlp")))

    return Case(call, _traced, shown=_short(given))


def requests(random: Random, folder: Path) -> Case:
    """A request of odd texts, as an object or in its published dict form, edited with each method."""
    given = _texts(random, subjects.REQUEST)
    if random.random() < 0.4:
        given = mutations.json_value(random, random.choice((given, subjects.RECORDS[0], subjects.FLAT[0])))
    method = random.choice(list(METHODS))
    params, options = subjects.params(method), subjects.options(method)
    made = isinstance(given, dict) and random.random() < 0.3

    def call() -> ke.Edit:
        request = ke.EditRequest(**given) if made else given
        return ke.edit(subjects.model(), [request], method, params=params, **options)

    def check(edit: ke.Edit) -> None:
        assert all(torch.isfinite(delta).all() for delta in subjects.deltas(edit).values()), "not finite"
        assert len(edit.requests) == 1

    return Case(call, check, shown=f"{method} {_short(given)}")


def contexts(random: Random, folder: Path) -> Case:
    """Templates that prompts are put into."""
    method = random.choice([name for name, row in METHODS.items() if row.takes("contexts")])
    sound = ["{}", "Japan. {}"] if method in subjects.SINGLE else [["{}"], ["Japan. {}"]]
    given = mutations.json_value(random, sound)
    params, options = subjects.params(method), subjects.options(method) | {"contexts": given}

    def call() -> ke.Edit:
        return ke.edit(subjects.model(), [subjects.REQUEST], method, params=params, **options)

    def check(edit: ke.Edit) -> None:
        assert all(torch.isfinite(delta).all() for delta in subjects.deltas(edit).values()), "not finite"

    return Case(call, check, shown=f"{method} {_short(given)}")


def _texts(random: Random, sound: dict) -> dict:
    """A text changed here and there, or a value of another kind."""
    given = dict(sound)
    for _ in range(random.choice((1, 1, 2, 3))):
        name = random.choice(sorted(given))
        old = given[name]
        kept = isinstance(old, str) and random.random() < 0.8
        given[name] = mutations.text(random, old) if kept else mutations.value(random)
    return given


def _traced(result: tuple[ke.Fact, ke.Trace]) -> None:
    fact, trace = result
    first, after = fact.subject_chars()
    assert fact.text[first:after] == fact.subject, "another subject"
    first, after = trace.subject_range
    assert fact.subject.strip() in "".join(trace.tokens[first:after]) or "\ufffd" in "".join(trace.tokens), "span"
    assert trace.scores.shape == (len(trace.tokens), 4) and np.isfinite(trace.scores).all(), "scores"
    assert (trace.scores >= 0).all() and (trace.scores <= 1 + 1e-5).all(), "no probabilities"
    assert 0 <= trace.low_score <= 1 + 1e-5 and 0 <= trace.high_score <= 1 + 1e-5, "no probabilities"


def _short(given: object) -> str:
    return json.dumps(given, default=repr)[:300]


DOORS = (prompts, requests, contexts)
