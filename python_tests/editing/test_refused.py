"""Histories and moments that an edit cannot be made from: told before anything is optimised, the model untouched."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing import closed_form
from knowedit_ext.editing.methods import METHODS, rome

from ..support.unchanged import assert_unchanged, snapshot
from .models import fresh
from .plain import moments_of

LAYERS = (0, 1)
REQUESTS = [ke.EditRequest("w5 {} w9 w10", "w3 w7", "w20 w23"), ke.EditRequest("{} w9", "w33", "w22 w24")]
REMEMBERING = [name for name, method in METHODS.items() if method.takes("earlier")]
KEYED = [name for name in REMEMBERING if name != "ultraedit"]
WITH_MOMENTS = [name for name in KEYED if METHODS[name].takes("moments")]


def edited(model: ke.EditableModel, name: str, params=None, **options) -> ke.Edit:
    method = METHODS[name]
    brief = replace(method.params_of("world"), **{"layers": LAYERS} | (params or {}))
    if hasattr(brief, "v_num_grad_steps"):
        brief = replace(brief, v_num_grad_steps=2)
    contexts = {"contexts": ["{}"] if method.single else [["{}"]], "moments": moments_of(model, LAYERS)}
    given = {key: value for key, value in contexts.items() if method.takes(key)} | options
    return ke.edit(model, REQUESTS[:1] if method.single else REQUESTS, name, params=brief, **given)


@pytest.fixture
def at_once(monkeypatch) -> None:
    no_values(monkeypatch)


def no_values(monkeypatch) -> None:
    """None is optimised from here on."""
    for module in (closed_form, rome):
        monkeypatch.setattr(module, "optimise_values", lambda *_, **__: pytest.fail("values are optimised first"))


def refused(model: ke.EditableModel, message: str, name: str, **options) -> None:
    before = snapshot(model.hf)
    with pytest.raises(ValueError, match=message):
        edited(model, name, **options)
    assert_unchanged(before, model.hf)


@pytest.mark.parametrize("name", REMEMBERING)
def test_history_of_another_model(name: str, monkeypatch) -> None:
    """One of the same shapes, one with other widths; the model's own edits, applied or not, are its history."""
    model, twin = fresh("llama"), fresh("llama", seed=1)
    theirs, wider, own = (edited(m, name) for m in (twin, fresh("llama", intermediate_size=96), model))
    with own.applied(model):
        later = edited(model, name, earlier=[own] if name not in ("rome", "r-rome") else [])
    with theirs.applied(twin):
        merged = ke.Edit.merge([theirs, edited(twin, name)])
    no_values(monkeypatch)
    for bad in (theirs, wider, merged):
        refused(model, r"earlier\[1\] \(.*\): the edit was made for another base", name, earlier=[later, bad])
    unsaid = replace(wider, base={}, model={})  # a file of before, which does not say
    refused(model, r"earlier\[0\]", name, earlier=[unsaid])


@pytest.mark.parametrize("name", KEYED)
def test_history_without_its_keys(name: str, at_once) -> None:
    model = fresh("gpt2")
    width = 4 * 32
    keys = torch.randn(width, 2, generator=torch.Generator().manual_seed(0))
    broken = keys.clone()
    broken[3, 1] = float("nan")
    for kept, message in (
        ({}, r"earlier\[0\] \(memit of 0 requests\) has no keys of layer 0: it keeps none"),
        ({1: keys}, "has no keys of layer 0: it has those of 1"),
        ({0: keys, 1: keys[:5]}, rf"has keys \[5, 2\] at layer 1: not \[{width}, n\]"),
        ({0: keys, 1: broken}, "has keys at layer 1 that are not finite"),
        ({0: broken / 0, 1: keys}, "has keys at layer 0 that are not finite"),
    ):
        edit = ke.Edit({}, "memit")
        edit.keys = kept
        refused(model, message, name, earlier=[edit])
    with pytest.raises(TypeError, match=r"earlier\[0\] is a dict: expected an Edit"):
        edited(model, name, earlier=[{}])


def test_ultraedits_history_without_its_statistics() -> None:
    model = fresh("gpt2")
    edit = edited(model, "ultraedit")
    name = next(iter(edit.statistics))
    for seen, message in (
        ({}, r"earlier\[0\] \(ultraedit\) keeps no statistics of '.*c_proj'"),
        (edit.statistics | {name: edit.statistics[name][:, 1:]}, r"earlier\[0\]: statistics of .* expected \[3, 160\]"),
        (edit.statistics | {name: edit.statistics[name] / 0}, r"earlier\[0\]: statistics of .* finite"),
    ):
        other = replace(edit)
        other.statistics = seen
        refused(model, message, "ultraedit", earlier=[other])


@pytest.mark.parametrize("name", WITH_MOMENTS)
def test_moments_that_are_no_use(name: str, at_once) -> None:
    model = fresh("gpt2")
    good = moments_of(model, LAYERS)
    nan = good[1].mean.clone()
    nan[2, 2] = float("nan")
    one = moments_of(model, LAYERS[:1])
    damaged = moments_of(model, LAYERS)
    damaged.by_layer[1] = replace(damaged[1], mean=nan)
    for moments, message in (
        (None, "moments are needed"),
        (one, "no moments of layer 1: there are those of 0"),
        (damaged, "moments of layer 1 hold NaN or infinite numbers"),
        (moments_of(fresh("llama", intermediate_size=96), LAYERS), "moments of layer 0 are 96 wide"),
    ):
        refused(model, message, name, moments=moments)
    if name in ("alphaedit", "encore"):  # which ask no more, and which add mu
        return
    few = moments_of(model, LAYERS, tokens=40)  # fewer keys than their width
    refused(model, "layer 0 are not positive definite.*ridge", name, moments=few)


@pytest.mark.parametrize(
    "limit, message",
    [
        (dict(nullspace_threshold=1e-12), "layer 0: no direction is in the null space at threshold 1e-12"),
        (dict(nullspace_threshold=1e9), r"layer 0: every direction is in the null space at threshold 1e\+09"),
        (dict(nullspace_share=1e-12), "layer 0: no direction is in the null space at share 1e-12"),
        (dict(nullspace_threshold=-1.0), "nullspace_threshold is -1.0"),
        (dict(nullspace_threshold=0.0), "nullspace_threshold is 0.0"),
        (dict(nullspace_threshold=float("nan")), "nullspace_threshold is nan"),
        (dict(nullspace_threshold=float("inf")), "nullspace_threshold is inf"),
        (dict(nullspace_share=1.0), "nullspace_share is 1.0"),
        (dict(nullspace_share=1.5), "nullspace_share is 1.5"),
        (dict(nullspace_share=0.1, nullspace_threshold=0.1), "two ways to tell the null space"),
        (dict(L2=0.0), "L2 is 0.0"),
    ],
)
def test_null_spaces_that_are_none(limit: dict, message: str, at_once) -> None:
    given = dict(nullspace_threshold=None, nullspace_share=None) | limit
    refused(fresh("gpt2"), message, "alphaedit", params=given)


def test_nothing_is_full_of_nothing() -> None:
    """The messages name what would do: the range of eigenvalues holds the threshold that works."""
    model = fresh("gpt2")
    with pytest.raises(ValueError) as error:
        edited(model, "alphaedit", {"nullspace_share": None, "nullspace_threshold": 1e9})
    median = float(re.search(r"median is ([\d.e+-]+)", str(error.value))[1])
    assert edited(model, "alphaedit", {"nullspace_share": None, "nullspace_threshold": median}).changes
