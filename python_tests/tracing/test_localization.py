"""The share of a fact that a layer brings back."""

from __future__ import annotations

import numpy as np
import pytest

import knowedit_ext as ke

from ..support.families import LAYERS, tiny_model


def made(scores, low: float, high: float) -> ke.Trace:
    scores = np.array(scores, np.float32)
    tokens = [f"t{n}" for n in range(len(scores))]
    return ke.Trace(scores, low, high, "x", (3,), tokens, np.arange(len(scores)), (0, 1), "mlp", 1)


def test_by_its_definition() -> None:
    got = ke.fraction_restored(made([[0.2, 0.1, 0.3], [0.4, 0.15, 0.2]], 0.2, 0.7))
    assert got.tolist() == pytest.approx([0.4, 0.0, 0.2], abs=1e-6)
    above = ke.fraction_restored(made([[0.2, 0.9], [0.1, 0.3]], 0.2, 0.7))  # restored beyond the clean score
    assert above.tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    some = ke.fraction_restored(made([[np.nan, np.nan], [0.2, 0.3]], 0.1, 0.6))  # tokens that were left out
    assert some.tolist() == pytest.approx([0.2, 0.4], abs=1e-6)
    assert ke.fraction_restored(made([[0.1, 0.1]], 0.1, 0.1)).tolist() == [0.0, 0.0]


@pytest.mark.filterwarnings("ignore:corrupting")
def test_of_a_trace() -> None:
    trace = ke.trace(tiny_model("llama"), ke.Fact("w5 {} w9", "w3 w7", "w20"), kind="mlp", window=2, noise=0.3)
    got = ke.fraction_restored(trace)
    assert got.shape == (LAYERS,) and got.dtype == np.float64 and (0 <= got).all() and got.max() <= 1
