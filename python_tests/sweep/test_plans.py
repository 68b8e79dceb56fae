"""What was planned once serves every prompt of the shape, and nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.sweep import Interventions, Patch, clean_run, engine, sweep
from knowedit_ext.sweep import plan as planning
from knowedit_ext.sweep.probe import probe
from knowedit_ext.tracing import cells

from ..support.families import tiny_model

FACTS = [ke.Fact("w5 {} w7 w9", subject) for subject in ("w3 w8", "w4 w2")]
KINDS = ("state", "mlp", "attn")


@pytest.fixture
def planners(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every tree of segments that is planned from here on."""
    for family in ("gpt2", "llama"):
        probe(tiny_model(family))  # which plans too, once a model
    made: list[int] = []
    real = planning.Planner

    def counted(*given):
        made.append(1)
        return real(*given)

    monkeypatch.setattr(planning, "Planner", counted)
    cells.all_cells.cache_clear()
    return made


def trace(fact: ke.Fact, kind: str, **settings) -> ke.Trace:
    return ke.trace(tiny_model("llama"), fact, kind, **{"samples": 2, "noise": 0.3, "window": 2} | settings)


@pytest.mark.filterwarnings("ignore:corrupting")
def test_a_second_trace_of_a_shape_plans_nothing(planners) -> None:
    fresh = []
    for kind in KINDS:
        cells.all_cells.cache_clear()
        fresh.append(trace(FACTS[1], kind))
    planners.clear()
    cells.all_cells.cache_clear()
    for kind in KINDS:
        trace(FACTS[0], kind)
    assert len(planners) == 3
    again = [trace(FACTS[1], kind) for kind in KINDS]
    assert len(planners) == 3
    for one, other in zip(fresh, again, strict=True):
        assert np.array_equal(one.sample_scores, other.sample_scores) and one.low_score == other.low_score


OTHER = [
    dict(fact=ke.Fact("w5 w6 {} w7 w9", "w3 w8")),
    dict(fact=ke.Fact("w5 {} w7", "w3 w8")),
    dict(fact=ke.Fact("w5 {} w7 w9", "w3 w8", target=" w2 w4")),
    dict(kind="attn"),
    dict(samples=3),
    dict(window=3),
    dict(sever="attn"),
    dict(sever="attn", compat="reference"),
    dict(replace=True, compat="reference"),
    dict(tokens="subject_last"),
    dict(corrupt_with="w9 w1"),
    dict(max_rows=20),
]


@pytest.mark.filterwarnings("ignore:corrupting")
@pytest.mark.parametrize("other", OTHER, ids=lambda other: ", ".join(other))
def test_another_shape_has_a_plan_of_its_own(planners, other) -> None:
    """The numbers are those of a trace in front of which nothing was kept."""
    asked = {"fact": FACTS[0], "kind": "mlp"}
    alone = trace(**asked | other)
    cells.all_cells.cache_clear()
    trace(**asked)
    planners.clear()
    behind = trace(**asked | other)
    assert planners
    assert np.array_equal(alone.sample_scores, behind.sample_scores, equal_nan=True)
    assert (alone.low_score, alone.high_score) == (behind.low_score, behind.high_score)


def test_every_setting_that_runs_depend_on_is_in_the_shape() -> None:
    """A field of the shape left out of its equality would serve a plan to a shape that is not its own."""
    assert all(field.compare for field in dataclasses.fields(cells.Shape))


def test_a_run_that_is_added_is_planned(planners) -> None:
    model = tiny_model("gpt2")
    clean = clean_run(model, [3, 4, 5])
    asked = Interventions()
    root = asked.add_root(3, prompt=0)
    asked.add_run(root, [], [2])
    first = sweep(model, [clean], asked, [clean.hidden])
    sweep(model, [clean], asked, [clean.hidden])
    assert len(planners) == 1
    asked.add_run(root, [Patch("mlp", (1,), (1,), torch.zeros(model.hidden_size))], [2])
    second = sweep(model, [clean], asked, [clean.hidden])
    assert len(planners) == 2
    torch.testing.assert_close(first.hidden(0), second.hidden(0), atol=1e-5, rtol=1e-5)  # of other products
    assert not torch.allclose(second.hidden(0), second.hidden(1), atol=1e-3)


def test_rows_that_do_not_fit_the_roots_are_refused() -> None:
    model = tiny_model("gpt2")
    clean = clean_run(model, [3, 4, 5])
    asked = Interventions()
    asked.add_run(asked.add_root(4, prompt=0), [], [2])
    with pytest.raises(ValueError, match=r"rows enter layer 0 for \[\[1, 3\]\]: expected \[\(1, 4\)\]"):
        sweep(model, [clean], asked, [clean.hidden])


def test_free_memory_counts_what_the_allocator_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert engine.free_bytes(torch.device("cuda")) == 150
