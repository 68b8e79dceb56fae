"""Stopping when solutions have settled, and whether the estimate of what is missing is one."""

from __future__ import annotations

import pytest
import torch
from moments.test_collect import texts
from support.families import tiny_model

import knowedit_ext as ke
from knowedit_ext.moments.settled import GROWTH, Settling


def relative(c: torch.Tensor, k: torch.Tensor, truth: torch.Tensor) -> float:
    """Error of C^-1 k by its effect on a typical key."""
    right, estimate = torch.linalg.solve(truth, k), torch.linalg.solve(c, k)
    size = torch.linalg.cholesky(truth).T
    return float((size @ (estimate - right)).norm() / (size @ right).norm())


def test_the_estimate_is_about_the_error():
    torch.manual_seed(0)
    d = 60
    mix = torch.randn(d, d, dtype=torch.float64) * torch.logspace(-1, 0, d, dtype=torch.float64)
    truth = mix.T @ mix
    settling, total, count, seen = Settling(0.05, {3: d}), torch.zeros(d, d, dtype=torch.float64), 0, []
    while True:
        x = torch.randn(60, d, dtype=torch.float64) @ mix
        if not count:
            settling.take_probes(3, x)
        total, count = total + x.T @ x, count + len(x)
        if count < settling.due:
            continue
        done = settling.settled({3: (total / count).tril()}, count)
        if settling.missing:
            seen.append((count, settling.missing[3], relative(total / count, settling.probes[3], truth)))
        if done:
            break
    count, estimate, error = seen[-1]
    assert estimate <= 0.05 and 10 * d < count < 10000 * d
    assert all(0.5 < e / r < 2 for n, e, r in seen if n > 10 * d)
    assert settling.due >= GROWTH * count


def test_collection_stops_and_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("knowedit_ext.moments.collect.GROUP", 50)
    model, some = tiny_model("llama"), texts(400)
    common = dict(layers=[0, 1], batch_tokens=100, stop="tolerance", progress=False)
    loose = ke.collect_moments(model, some, tolerance=0.5, **common)
    tight = ke.collect_moments(model, some, tolerance=1e-4, **common)
    assert loose[0].count < tight[0].count == sum(len(t.split()) for t in some)
    assert all(m.missing <= 0.5 for m in loose.by_layer.values())
    assert loose[0].origin["texts"][0]["ended"] == "tolerance" and tight[0].origin["texts"][0]["ended"] == "text"
    assert tight[0].missing > 1e-4
    assert ke.collect_moments(model, some, [0], progress=False)[0].missing is None


def test_a_matrix_that_cannot_be_factored_is_not_settled():
    settling = Settling(0.5, {0: 4})
    assert not settling.settled({0: torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.1])).double()}, 10)
    assert not settling.missing and settling.due == 15


def test_missing_is_kept_by_the_store(tmp_path):
    m = ke.collect_moments(
        tiny_model("llama"), texts(60), [1], out=tmp_path, stop="tolerance", tolerance=0.9, progress=False
    )
    assert m[1].missing == ke.Moments.load(tmp_path)[1].missing == pytest.approx(m[1].missing)
