"""Mistakes planted in KN, MEND, KE and their training: each is found by a check against an independent oracle."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import knowedit_ext as ke
from knowedit_ext.editors import frozen as frozen_module
from knowedit_ext.editors import training as training_module
from knowedit_ext.editors.texts import gradient_rows
from knowedit_ext.editors.training import EditorTraining
from knowedit_ext.model.head import distribution
from knowedit_ext.world import load_world

from ..editing.models import editable, fresh
from ..editing.test_kn import PARAMS as KN_PARAMS
from ..editing.test_kn import REQUEST, close, plain_scores, words
from .models import REQUESTS, efk_editor, mend_editor
from .plain import efk_deltas, mend_deltas
from .test_apply import apart, names
from .test_training import EDIT, LOC, OUTER, PARAMS, plain_losses
from .test_training import _rows as rows_of

efk_module, mend_module = (importlib.import_module(f"knowedit_ext.editors.{name}") for name in ("efk", "mend"))

# -- checks: each passes on the package as it is -----------------------------------------------------------------------


def mend_edits() -> None:
    model = fresh("gpt2")
    editor = mend_editor(model)
    before = {name: x.clone() for name, x in editor.tensors.items()}
    for asked in (REQUESTS, REQUESTS[:1]):
        assert apart(ke.mend(model, asked, editor), mend_deltas(model, before, names(editor), asked)) < 1e-4
    for edit, request in zip(ke.mend_each(model, REQUESTS, editor), REQUESTS, strict=True):
        assert apart(edit, mend_deltas(model, before, names(editor), [request])) < 1e-4
    assert all(torch.equal(x, before[name]) for name, x in editor.tensors.items())


def ke_edits() -> None:
    model = fresh("llama")
    editor = efk_editor(model)
    want = efk_deltas(model, editor.tensors, names(editor), REQUESTS[0])
    assert apart(ke.efk(model, REQUESTS[0], editor), want) < 1e-4


def kn_scores() -> None:
    model = editable("gpt2")
    first = plain_scores(model, words(5, 3, 7, 9, 10), words(31)[-1:], KN_PARAMS.steps)
    second = plain_scores(model, words(5, 3, 7, 9, 10, 31), words(32)[-1:], KN_PARAMS.steps)
    assert close(ke.knowledge_neurons(model, REQUEST, KN_PARAMS).scores, (first + second) / 2)


def kn_rows() -> None:
    model = fresh("gpt2")
    embedding = model.hf.get_input_embeddings().weight.detach()
    neurons = ke.knowledge_neurons(model, REQUEST, KN_PARAMS)
    want = embedding[words(20, 23)[-2:]].sum(0) - 2 * embedding[neurons.said]
    for change in ke.kn(model, REQUEST, KN_PARAMS).changes.values():
        rows = change.outputs @ change.inputs.T
        assert torch.allclose(rows[:, rows.abs().sum(0) > 0], want[:, None], atol=1e-6)


@cache
def world() -> tuple[ke.EditableModel, dict]:
    model = ke.load_model(load_world().folder, dtype="float32")
    one = lambda record, key: len(model.tokenizer(f" {record['requested_rewrite'][key]['str']}").input_ids) == 1  # noqa: E731
    return model, next(r for r in load_world().records() if one(r, "target_new") and one(r, "target_true"))


def with_space(record: dict, key: str) -> SimpleNamespace:
    rewrite = record["requested_rewrite"]
    return SimpleNamespace(
        prompt=rewrite["prompt"], subject=rewrite["subject"], target_new=" " + rewrite[key]["str"].strip()
    )


def mend_target() -> None:
    """Of a tokenizer that tells " word" from "word"."""
    model, record = world()
    editor = mend_editor(model, layers=(model.num_layers - 2, model.num_layers - 1))
    want = mend_deltas(model, editor.tensors, names(editor), [with_space(record, "target_new")])
    model.hf.requires_grad_(False)
    assert apart(ke.mend(model, record, editor), want) < 1e-4


def kn_target() -> None:
    model, record = world()
    text = record["requested_rewrite"]["prompt"].replace("{}", record["requested_rewrite"]["subject"])
    asked = with_space(record, "target_true").target_new
    want = plain_scores(model, model.tokenizer(text).input_ids, model.tokenizer(asked).input_ids[-1:], 5)
    assert close(ke.knowledge_neurons(model, record, KN_PARAMS).scores, want)


def an_iteration(kind: str = "mend") -> None:
    """Losses, gradients and statistics against whole passes of a model whose weights are changed."""
    make = {"mend": mend_editor, "efk": efk_editor}[kind]
    model = fresh("gpt2")
    editor, again = make(model), make(model)
    report = EditorTraining(model, editor, PARAMS).step(EDIT, OUTER, LOC)
    again.network.train()
    rows = rows_of(model, again)
    losses = plain_losses(model, again, again.factors(rows, EDIT[0].ids))
    for name, loss in losses.items():
        assert report[f"loss/{name}"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    ((0.1 * losses["edit"] + losses["loc"]) / 2).backward()
    for (name, p), ours in zip(again.network.named_parameters(), editor.network.parameters(), strict=True):
        if p.grad is not None:
            assert (ours.grad - p.grad).norm() <= 2e-3 * p.grad.norm() + 1e-7, name


def statistics() -> None:
    """Mean and deviation of all rows that were ever counted, as numpy has them."""
    model = fresh("gpt2")
    editor = ke.MEND.new(model, [1, 3], rank=3)
    seen: dict[str, list[np.ndarray]] = {}
    for number in range(3):
        texts = [[training_module.Text.of_last([5 + number, 3, 7, 9, 10 + number, 20], 2)]]
        editor.network.train()
        with torch.enable_grad():
            (rows,) = gradient_rows(model, texts, editor.weights)
        editor.read([rows])
        for weight in editor.weights:
            x, d = (side.detach().double().numpy() for side in rows[weight.name])
            kept = x.any(1) & d.any(1)
            seen.setdefault(weight.key, []).append(np.concatenate([x[kept], d[kept]], 1))
    for key, parts in seen.items():
        every, transform = np.concatenate(parts), editor.network.mend[key]
        mean = torch.cat([transform.u_mean, transform.v_mean])
        std = torch.cat([transform.u_std, transform.v_std])
        assert float(transform.k) == len(every)
        assert np.allclose(mean, every.mean(0), rtol=1e-4, atol=1e-6)
        assert np.allclose(std, every.std(0, ddof=1), rtol=1e-4, atol=1e-6)


def evaluation_counts_nothing() -> None:
    model = fresh("gpt2")
    editor = mend_editor(model)
    training = EditorTraining(model, editor, PARAMS)
    before = {name: x.clone() for name, x in editor.tensors.items()}
    training.validate([(EDIT, OUTER, LOC)])
    ke.mend(model, REQUESTS, editor)
    assert all(torch.equal(x, before[name]) for name, x in editor.tensors.items())


def the_start_learns() -> None:
    model = fresh("gpt2")
    norms = EditorTraining(model, ke.MEND.new(model, [1, 3], rank=5), PARAMS).step(EDIT, OUTER, LOC)["norms"]
    assert all(norms[name] > 0 for name in norms if name.endswith((".u", ".bias", "mode_shift.weight")))


def steps() -> None:
    """Gradients of three, then of two iterations, clipped, and Adam's two rates, against the plain formulas."""
    model = fresh("gpt2")
    params = replace(PARAMS, grad_clip=1e-3)
    editor = mend_editor(model)
    training = EditorTraining(model, editor, params)
    named = dict(editor.network.named_parameters())
    start = {name: p.detach().clone() for name, p in named.items()}
    stepped = [training.step(EDIT, OUTER, LOC)["stepped"] for _ in range(2)]
    gradients = {name: p.grad.clone() for name, p in named.items()}
    third = training.step(EDIT, OUTER, LOC)
    assert [*stepped, third["stepped"]] == [False, False, True] and third["grad"] > params.grad_clip
    one = mend_editor(model)  # the third iteration's own gradient
    once = EditorTraining(model, one, params)
    for _ in range(2):
        once.step(EDIT, OUTER, LOC)
    one.network.zero_grad()
    once.params = replace(params, accumulate_bs=100)
    once.step(EDIT, OUTER, LOC)
    for name, p in one.network.named_parameters():
        gradients[name] += p.grad * (100 / params.accumulate_bs)
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    for name, p in named.items():
        g = gradients[name] * (params.grad_clip / norm)
        rate = params.lr_lr if name == "edit_lrs" else params.lr
        moved = -rate * g / (g.abs() + 1e-8)  # Adam's first step: mhat / (sqrt(vhat) + eps)
        assert torch.allclose(p.detach() - start[name], moved, rtol=1e-2, atol=1e-3 * rate), name


def together_is_one_by_one() -> None:
    one = EditorTraining(fresh("gpt2"), mend_editor(fresh("gpt2")), PARAMS)
    many = EditorTraining(fresh("gpt2"), mend_editor(fresh("gpt2")), PARAMS)
    want = [one.step(EDIT, OUTER, LOC)["stepped"] for _ in range(7)]
    assert [report["stepped"] for report in many.steps([(EDIT, OUTER, LOC)] * 7)] == want
    assert want == [False, False, True, False, True, False, True]


# -- mistakes ----------------------------------------------------------------------------------------------------------


def relu(layer, z, mode):
    inner = z @ layer.v.T @ layer.u.T + layer.bias
    return z + nn.functional.relu(inner * layer.mode_scale.weight[mode] + layer.mode_shift.weight[mode])


def rates_swapped(original):
    def made(editor, read, ids=()):
        rates = editor.network.edit_lrs
        kept = rates.data.clone()
        rates.data = rates.data.flip(0)
        try:
            return original(editor, read, ids)
        finally:
            rates.data = kept

    return made


def not_frozen(original):
    def read(editor, rows):
        was = editor.network.training
        editor.network.train()
        try:
            return original(editor, rows)
        finally:
            editor.network.train(was)

    return read


def wrapped(change: Callable) -> Callable:
    """Of a function, the mistaken one: `change` of its result."""
    return lambda original: lambda *given, **named: change(original(*given, **named))


def doubled(fact):
    return replace(fact, target_ids=fact.target_ids * 2)


def constant(value) -> Callable:
    return lambda original: value


def _kl(model, before, after):
    old, new = distribution(model, before), distribution(model, after)
    return (old.exp() * (old - new)).sum(-1)


MEND = mend_module.MEND
KN, NEURONS = "knowedit_ext.editing.methods.kn.", "knowedit_ext.editing.neurons."

# what it is: (where, the mistaken function made of the right one, the check that has to find it)
MISTAKES = {
    "rows of zero gradient kept": (
        (MEND, "counted_rows"),
        constant(lambda editor, rows, weight: rows[weight.name]),
        mend_edits,
    ),
    "relu for clamp": ((mend_module._Layer, "forward"), constant(relu), the_start_learns),
    "one mode for all weights of a shape": (
        (mend_module._Layer, "forward"),
        lambda original: lambda layer, z, mode: original(layer, z, torch.zeros_like(mode)),
        mend_edits,
    ),
    "rates swapped": ((MEND, "factors_each"), rates_swapped, mend_edits),
    "statistics not frozen at evaluation": ((MEND, "read"), not_frozen, mend_edits),
    "statistics not frozen at validation": ((MEND, "read"), not_frozen, evaluation_counts_nothing),
    "divided by all rows": (
        (mend_module._Transform, "observe"),
        lambda original: lambda t, x, d: (original(t, x, d), t.u_std.mul_(((t.k - 1) / t.k) ** 0.5))[0],
        statistics,
    ),
    "rows counted twice": (
        (mend_module._Transform, "observe"),
        lambda original: lambda t, x, d: original(t, torch.cat([x, x]), torch.cat([d, d])),
        statistics,
    ),
    "epsilon left out of a layer's residual": (
        (mend_module._Layer, "forward"),
        lambda original: lambda layer, z, mode: original(layer, z, mode) - z,
        mend_edits,
    ),
    "a mask that is not normalised": (
        (efk_module._Conditioner, "forward"),
        wrapped(lambda parts: [(c, 2 * a, d, b, n) for c, a, d, b, n in parts]),
        ke_edits,
    ),
    "tokens read from the left alone": (
        (efk_module._Condition, "forward"),
        lambda original: lambda condition, ids: original(condition, [each.flip(0) for each in ids]),
        ke_edits,
    ),
    "weights not normed": (
        (efk_module._NormedLinear, "forward"),
        constant(lambda layer, x: x @ (layer.weight_g * layer.weight_v).T + layer.bias),
        ke_edits,
    ),
    "doubled target embedding": (KN + "tokenize_fact", wrapped(doubled), kn_rows),
    "the answer without its space": (NEURONS + "spaced", constant(lambda answer, *_: answer), kn_target),
    "the target without its space": (
        "knowedit_ext.editing.request.spaced",
        constant(lambda target, *_: target),
        mend_target,
    ),
    "the end of the integral left out": (
        "torch.linspace",
        lambda original: lambda first, last, steps: original(first, last, steps + 1)[:-1],
        kn_scores,
    ),
    "tokens of the answer read at one place": (
        NEURONS + "_read",
        lambda original: (
            lambda model, text, answer, request, compat: original(model, text, answer, request, "reference")
        ),
        kn_scores,
    ),
    "KL the wrong way round": (
        (training_module, "divergence"),
        constant(lambda model, before, states: _kl(model, states, before.states)),
        an_iteration,
    ),
    "what is left alone seen after the edit": (
        (frozen_module.Frozen, "said"),
        wrapped(lambda said: said._replace(states=said.states + 0.1)),
        an_iteration,
    ),
    "the change of another edit's rows": (
        "knowedit_ext.editors.training.edited",
        lambda original: (
            lambda modules, factors, counts: original(
                modules, [{n: (-x, d) for n, (x, d) in f.items()} for f in factors], counts
            )
        ),
        an_iteration,
    ),
    "a step too early": (
        (EditorTraining, "until_step"),
        constant(property(lambda training: training.params.accumulate_bs)),
        together_is_one_by_one,
    ),
    "not clipped": ("torch.nn.utils.clip_grad_norm_", constant(lambda p, most: torch.tensor(1.0)), steps),
    "one rate for all": (
        "torch.optim.Adam",
        lambda original: lambda groups: original([{"params": g["params"], "lr": PARAMS.lr} for g in groups]),
        steps,
    ),
}


CHECKS = {check.__name__: check for _, _, check in MISTAKES.values()}


@pytest.mark.parametrize("check", CHECKS)
def test_the_package_passes(check: str) -> None:
    CHECKS[check]()


def test_an_iteration_of_ke() -> None:
    an_iteration("efk")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, wrong, check = MISTAKES[mistake]
    if isinstance(where, str):
        monkeypatch.setattr(where, wrong(_found(where)))
    else:
        monkeypatch.setattr(*where, wrong(vars(where[0])[where[1]]))
    with pytest.raises(AssertionError):
        check()


def _found(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
