"""Regressions against the textbook: normal equations through a pseudo-inverse, and scipy's F."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import f as f_distribution
from scipy.stats import pearsonr

import knowedit_ext as ke


def r_squared(design: np.ndarray, y: np.ndarray) -> tuple[float, int]:
    fitted = design @ np.linalg.pinv(design) @ y
    return 1 - ((y - fitted) ** 2).sum() / ((y - y.mean()) ** 2).sum(), np.linalg.matrix_rank(design)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(4, 9), st.booleans())
def test_against_the_textbook(seed: int, layers: int, facts: int, constant: bool) -> None:
    """constant: an effect that is the same for all facts at the first layer, so that a column of the design is lost."""
    draw = np.random.RandomState(seed)
    layer = np.repeat(np.arange(layers) * 3, facts)
    effect, score = draw.rand(len(layer)), draw.randn(len(layer)) + layer
    if constant:
        effect[layer == 0] = 0.0
    got = ke.regress(score.tolist(), layer.tolist(), effect.tolist())
    dummies = (layer[:, None] == np.unique(layer)).astype(float)
    designs = {
        "layer": dummies,
        "trace": np.stack([np.ones_like(effect), effect], axis=1),
        "both": np.concatenate([dummies, dummies * effect[:, None]], axis=1),
    }
    want = {name: r_squared(design, score) for name, design in designs.items()}
    for name in designs:
        assert getattr(got, f"r2_{name}") == pytest.approx(want[name][0], abs=1e-9)
    assert got.gain == pytest.approx(want["both"][0] - want["layer"][0], abs=1e-9)
    df = (int(want["both"][1] - want["layer"][1]), int(len(score) - want["both"][1]))
    assert got.df == df and got.n == len(score)
    if df[0] and df[1]:
        f = (want["both"][0] - want["layer"][0]) / df[0] / ((1 - want["both"][0]) / df[1])
        assert got.f == pytest.approx(f, rel=1e-6, abs=1e-9)
        assert got.p == pytest.approx(f_distribution.sf(f, *df), rel=1e-5, abs=1e-12)
    for n in np.unique(layer):
        here = layer == n
        expected = 0.0 if np.ptp(effect[here]) == 0 else pearsonr(score[here], effect[here])[0]
        assert got.correlation[int(n)] == pytest.approx(expected, abs=1e-9)


def test_nothing_left_to_test() -> None:
    got = ke.regress([1.0, 2.0, 3.0], [0, 1, 2], [0.5, 0.25, 0.125])
    assert np.isnan(got.f) and np.isnan(got.p) and got.r2_layer == pytest.approx(1.0)
    assert json.loads(json.dumps(got.to_dict(), allow_nan=False))["f"] is None


@pytest.mark.parametrize(
    "rows, message",
    [
        (([1.0, 2.0], [0], [0.1, 0.2]), "2 scores, 1 layers, 2 effects"),
        (([], [], []), "expected a row of three"),
        (([1.0, float("nan")], [0, 1], [0.1, 0.2]), "no finite number"),
        (([1.0, 1.0], [0, 1], [0.1, 0.2]), "all scores are the same"),
    ],
)
def test_what_cannot_be_explained(rows, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ke.regress(*rows)
