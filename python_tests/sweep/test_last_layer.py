"""In its last layer a sweep computes what is read alone, and finds the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.sweep import engine, last
from knowedit_ext.sweep.plan import plan_of
from knowedit_ext.tracing import cells
from knowedit_ext.tracing.cells import all_cells

from ..support.families import FAMILIES, LAYERS, tiny_model

FACT = ke.Fact("w5 {} w7 w9", "w3 w8")
CPU = [torch.device("cpu")] * LAYERS


def scores(family: str, kind: str, **settings) -> torch.Tensor:
    all_cells.cache_clear()  # and the plans with them
    settings = dict(samples=3, noise=0.5, window=2, seed=4) | settings
    t = ke.trace(tiny_model(family), FACT, kind, **settings)
    return torch.tensor([*t.scores.ravel(), t.low_score, t.high_score])


@pytest.mark.filterwarnings("ignore:corrupting")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "kind, settings",
    [
        ("state", {}),
        ("mlp", {}),
        ("attn", dict(window=3)),
        ("state", dict(sever="mlp")),
        ("state", dict(sever="attn", compat="reference")),
        ("mlp", dict(answer_tokens=2)),
    ],
)
def test_the_same_scores_as_of_all_rows(monkeypatch, family, kind, settings):
    few = scores(family, kind, **settings)
    monkeypatch.setattr(last, "WORTH", 10**9)
    every = scores(family, kind, **settings)
    all_cells.cache_clear()
    torch.testing.assert_close(few, every, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kinds", [("state",), ("state", "mlp", "attn")])
def test_what_is_read_is_computed(kinds):
    """A row for each that is read, and for the root's that these are restored from."""
    shape = dict(tokens=6, first=1, copies=2, readout=range(5, 6), cells=tuple(range(6)), window=2)
    (asked, _) = all_cells((cells.Shape(layers=LAYERS, sever=None, second=False, low=False, **shape),), kinds)
    (one,) = plan_of(asked, [6], CPU, 10_000).passes
    layout = one.layout
    assert layout.computed[:-1] == layout.rows[:-2]
    behind = layout.rows[-1] - len(layout.last)  # born behind the last layer
    assert set(one.read.tolist()) | set(layout.births[-1].tolist()) == set(range(layout.rows[-1]))
    assert len(layout.last) * 2 < layout.rows[-2] and behind == 2  # the last token's own cell, a row a copy


FAULTS = {
    "other queries": (last, "of_rows", lambda real, table, rows: real(table, rows.flip(0))),
    "no restores": (last, "_of", lambda real, *given: []),
    "other keys": (engine, "keys_values", lambda real, *given: tuple(x.flip(0) for x in real(*given))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(monkeypatch, fault):
    want = scores("gpt2", "mlp")
    where, name, planted = FAULTS[fault]
    monkeypatch.setattr(where, name, partial(planted, getattr(where, name)))
    got = scores("gpt2", "mlp")
    all_cells.cache_clear()
    assert float((got - want).abs().max()) > 1e-5
