"""Every public function with arguments of other kinds and beyond their ranges."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

import knowedit_ext as ke
from knowedit_ext.editing.methods import METHODS

from .. import mutations, subjects
from ..outcome import Case

TRACE: dict[str, Any] = dict(
    kind="state",
    window=2,
    samples=2,
    noise="s3",
    seed=1,
    sever=None,
    compat=None,
    replace=False,
    corrupt_with=None,
    answer_tokens=1,
    score="probability",
    against=None,
    tokens=None,
    max_rows=None,
)
NOISES = ("s3", "u0.1", "t", "m", "s-1", "s", "x3", "snan", "sinf", "s0", "s1e400", "0.1", 0.1, 0.0, -1.0, 10**400)


def _kwargs(random: Random, sound: dict[str, Any]) -> dict[str, Any]:
    given = dict(sound)
    for _ in range(random.choice((1, 1, 2))):
        name = random.choice(sorted(given))
        if name == "noise" and random.random() < 0.8:
            given[name] = random.choice(NOISES)
        else:
            old = given[name]
            mended = random.random() < 0.3 and isinstance(old, str)
            given[name] = mutations.text(random, old) if mended else mutations.value(random)
    return given


def _small(given: dict[str, Any], *names: str) -> dict[str, Any]:
    """What only asks for more work is kept small: it is no fault that much work takes long."""
    for name in names:
        if isinstance(given.get(name), int) and not isinstance(given[name], bool) and given[name] > 4:
            given[name] = 3
    return given


def traced(random: Random, folder: Path) -> Case:
    """`trace`'s keyword arguments."""
    given = _small(_kwargs(random, TRACE), "samples", "answer_tokens")

    def check(found: ke.Trace) -> None:
        assert given["tokens"] is not None or np.isfinite(found.scores).all(), "scores are not finite"
        assert np.isfinite([found.low_score, found.high_score]).all()

    return Case(lambda: ke.trace(subjects.model(), ke.Fact(**subjects.FACT), **given), check, shown=_short(given))


def edited(random: Random, folder: Path) -> Case:
    """The methods' arguments and parameters."""
    method = random.choice(list(METHODS))
    params = subjects.params(method)
    options = dict(compat=None, ridge=None, seed=0, values=None, batch=None, preserve=()) | subjects.options(method)
    options = {name: value for name, value in options.items() if METHODS[method].takes(name)}
    if random.random() < 0.6 or not options:
        params = _kwargs(random, params)
    else:
        options = _kwargs(random, options)
    _small(params, "v_num_grad_steps", "num_steps")

    def call() -> ke.Edit:
        return ke.edit(subjects.model(), [subjects.REQUEST], method, params=params, **options)

    def check(edit: ke.Edit) -> None:
        assert all(torch.isfinite(delta).all() for delta in subjects.deltas(edit).values()), "not finite"

    return Case(call, check, shown=f"{method} {_short(params)} {_short(options)}")


def measured(random: Random, folder: Path) -> Case:
    """The arguments of `evaluate`, `trace_dataset`, `collect_moments`, `noise_level`."""
    model, out = subjects.model(), folder / "out"
    doors: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "evaluate": (
            lambda **k: ke.evaluate(model, subjects.RECORDS, **k),
            dict(
                edit=None,
                generation=False,
                baseline=True,
                dataset=None,
                snippets=None,
                attributes=False,
                max_length=12,
                time=None,
                compat=None,
                skip_bad=False,
                limit=None,
                group=None,
                max_rows=None,
                out=None,
            ),
        ),
        "trace_dataset": (
            lambda **k: ke.trace_dataset(model, subjects.KNOWN, out, progress=False, **k),
            dict(kinds=("state",), window=2, samples=1, noise="s3", seed=1, group=8, max_rows=None, answer_tokens=1),
        ),
        "collect_moments": (
            lambda **k: ke.collect_moments(model, subjects.TEXTS, progress=False, out=out, **k),
            dict(
                layers=[1],
                max_tokens=None,
                batch_tokens=64,
                max_length=None,
                max_texts=None,
                shuffle=None,
                stop=None,
                tolerance=0.1,
                products="float32",
            ),
        ),
        "noise_level": (
            lambda **k: ke.noise_level(model, **k),
            dict(rule="s3", subjects=["Miles Davis", "Japan"], texts=None),
        ),
    }
    name = random.choice(sorted(doors))
    door, sound = doors[name]
    given = _small(_kwargs(random, sound), "samples", "answer_tokens")
    if "noise" not in given and "rule" in given and random.random() < 0.5:
        given["rule"] = random.choice(NOISES)

    def check(found: Any) -> None:
        if name == "evaluate":
            json.dumps(found.to_dict(), allow_nan=False, default=str)
        elif name == "collect_moments":
            assert all(bool(found[layer].mean.isfinite().all()) and found[layer].count > 0 for layer in found)
        elif name == "noise_level":
            assert callable(found) or np.isfinite(found)

    return Case(lambda: door(**given), check, shown=f"{name} {_short(given)}")


def hosts(random: Random, folder: Path) -> Case:
    """Objects of the wrong kind where a model, a fact, requests, records, parameters or moments are expected."""
    model, hf = subjects.model(), subjects.model().hf
    fact = ke.Fact(**subjects.FACT)
    rome, memit = subjects.edit("rome"), subjects.edit("memit")
    right: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "trace": (lambda *a: ke.trace(*a, samples=1), [model, fact]),
        "trace_dataset": (lambda *a: ke.trace_dataset(*a, progress=False, samples=1), [model, [fact], folder / "out"]),
        **{name: (partial(_edit, name), [model, [subjects.REQUEST], subjects.params(name)]) for name in METHODS},
        "evaluate": (
            lambda *a: ke.evaluate(*a, generation=False),
            [model, subjects.RECORDS, rome],
        ),
        "collect_moments": (lambda *a: ke.collect_moments(*a, progress=False), [model, subjects.TEXTS, [1]]),
        "load_model": (ke.load_model, [(hf, model.tokenizer)]),
        "apply": (lambda edit, model: edit.apply(model) or edit.revert(model), [rome, model]),
        "merge": (ke.Edit.merge, [[rome, memit]]),
        "Edit.load": (ke.Edit.load, ["absent.safetensors"]),
        "Trace.load": (ke.Trace.load, ["absent.npz"]),
        "Moments.load": (ke.Moments.load, [str(folder / "absent")]),
        "Report.load": (ke.Report.load, [str(folder / "absent")]),
        "EditRequest.of": (ke.EditRequest.of, [subjects.REQUEST]),
    }
    name = random.choice(sorted(right))
    door, arguments = right[name]
    arguments = list(arguments)
    if random.random() < 0.1:
        arguments.pop()
    else:
        at = 1 if name == "apply" else random.randrange(len(arguments))
        others = (
            hf,
            model.tokenizer,
            model,
            (hf, None),
            (hf,),
            (None, model.tokenizer),
            fact,
            [fact, None],
            subjects.REQUEST,
            subjects.RECORDS[0],
            [subjects.RECORDS[0], 3],
            rome,
            subjects.moments(),
            ke.FTParams.from_dict(subjects.params("ft")),
            torch.zeros(3),
            np.zeros((2, 2)),
            "Miles Davis plays the",
            b"bytes",
            Path("absent"),
            object(),
            len,
            range(3),
            {1: 2},
        )
        arguments[at] = random.choice(others) if random.random() < 0.7 else mutations.value(random)
    return Case(lambda: door(*arguments), shown=f"{name}({', '.join(_brief(a) for a in arguments)})")


def _edit(method: str, *arguments: Any) -> ke.Edit:
    model, requests, params = (*arguments, None, None, None)[:3]
    return ke.edit(model, requests, method, params=params, **subjects.options(method))


def _brief(given: Any) -> str:
    try:
        return repr(given)[:60]
    except RecursionError:
        return "deep"


def _short(given: object) -> str:
    return json.dumps(given, default=repr)[:300]


DOORS = (traced, edited, measured, hosts)
