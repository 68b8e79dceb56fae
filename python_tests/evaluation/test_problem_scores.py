"""The scores by their formulas (specification of Hase et al. 2023: the first prompt of each kind)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import knowedit_ext as ke

KINDS = ("rewrite", "paraphrase", "neighborhood")
SHARES = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=3, max_size=3)


@given(st.sampled_from(sorted(ke.PROBLEMS)), SHARES, SHARES)
def test_by_the_formulas(problem: str, before: list[float], after: list[float]) -> None:
    got = ke.problem_scores(problem, dict(zip(KINDS, before, strict=True)), dict(zip(KINDS, after, strict=True)))
    assert all(0 <= value <= 1 and isinstance(value, float) for value in got.values())
    for kind, p, q in list(zip(KINDS, before, after, strict=True))[:2]:
        if problem == "fact_erasure":
            want = max(0.0, (p - q) / p) if p > 0 else 0.0
        else:
            want = max(2e-8, 1 - (1 - q) / (1 - p)) if p < 1 else float(q == 1) or 2e-8
        assert got[kind] == pytest.approx(want, abs=1e-9)
    p, q = before[2], after[2]
    assert got["neighborhood"] == pytest.approx(1 - abs(q - p) / (abs(p - 0.5) + 0.5))
    three = [got[kind] for kind in KINDS]
    assert got["overall"] == pytest.approx(np.mean(three))
    assert got["harmonic"] == pytest.approx(3 / sum(1 / x for x in three) if min(three) > 0 else 0.0)


def test_many_at_once_and_essence() -> None:
    before = {kind: [0.1, 0.4] for kind in KINDS} | {"essence": [10.0, 10.0]}
    after = {kind: [0.6, 0.2] for kind in KINDS} | {"essence": [11.0, 30.0]}
    got = ke.problem_scores("fact_erasure", before, after)
    assert got["rewrite"].tolist() == pytest.approx([0.0, 0.5])
    assert got["essence"].tolist() == pytest.approx([0.8, 0.0])
    assert got["overall_essence"].tolist() == pytest.approx((3 * got["overall"] + got["essence"]) / 4)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("erasure", {}, "unknown problem 'erasure'"),
        ("fact_erasure", {"rewrite": 1.5}, "pre.rewrite is 1.5: expected probabilities"),
        ("fact_erasure", {"rewrite": float("nan")}, "pre.rewrite is nan"),
        ("fact_erasure", {"paraphrase": "high"}, "pre.paraphrase is 'high'"),
    ],
)
def test_what_is_no_probability(name: str, change: dict, message: str) -> None:
    sides = dict.fromkeys(KINDS, 0.5)
    with pytest.raises(ValueError, match=message):
        ke.problem_scores(name, sides | change, sides)
    with pytest.raises(ValueError, match="post lacks 'neighborhood'"):
        ke.problem_scores("fact_erasure", sides, {"rewrite": 0.1, "paraphrase": 0.1})
