"""Kinds of traces, and how many layers are restored together."""

from __future__ import annotations

import pytest

import knowedit_ext as ke
from knowedit_ext.tracing.kinds import KINDS, kind_of_file, kinds_of, window_for, window_layers

from ..support.families import tiny_hf, tiny_model
from ..support.tokenizers import word_level

pytestmark = pytest.mark.filterwarnings("ignore:corrupting")


@pytest.mark.parametrize("layers, window", [(1, 1), (2, 1), (3, 1), (4, 2), (6, 3), (12, 6), (19, 9), (20, 10)])
def test_the_default_window_is_at_most_half_of_the_model(layers: int, window: int) -> None:
    assert window_for(layers, None, tuple(KINDS)) == window


@pytest.mark.parametrize("layers", [24, 28, 36, 44, 48])
def test_models_of_the_papers_have_the_published_window(layers: int) -> None:
    assert window_for(layers, None, tuple(KINDS)) == 10


@pytest.mark.parametrize("layers", range(2, 49))
def test_no_window_that_is_let_through_restores_every_layer(layers: int) -> None:
    for window in range(1, 2 * layers + 3):
        whole = any(len(window_layers(layer, window, layers)) == layers for layer in range(layers))
        for kind in KINDS:
            if whole and KINDS[kind].windowed:
                with pytest.raises(ValueError, match=f"window is {window}, the model has {layers} layers"):
                    window_for(layers, window, (kind,))
            else:
                assert window_for(layers, window, (kind,)) == window


def test_traces_and_data_sets_follow_the_rule(tmp_path) -> None:
    model, fact = tiny_model("gpt2"), ke.Fact("w5 w6 {} w9 w10 w11", "w3 w7", target=" w20")
    asked = dict(samples=2, noise=0.5)
    trace = ke.trace(model, fact, kind="mlp", **asked)
    assert trace.window == 2 == trace.settings["window"]
    assert (trace.scores == ke.trace(model, fact, kind="mlp", window=2, **asked).scores).all()
    assert ke.trace(model, fact, window=10, **asked).window == 10  # states have none
    with pytest.raises(ValueError, match="window is 4"):
        ke.trace_dataset(model, [fact], tmp_path / "out", window=4, **asked, progress=False)
    assert not list(tmp_path.iterdir())
    effects = ke.trace_dataset(model, [fact], tmp_path / "out", **asked, progress=False)
    assert {name: kind.window for name, kind in effects.kinds.items()} == {"state": 1, "mlp": 2, "attn": 2}


def test_a_model_of_one_layer() -> None:
    model = ke.load_model((tiny_hf("gpt2", n_layer=1), word_level(60)))
    assert ke.trace(model, ke.Fact("w5 {} w9", "w3", target=" w20"), kind="mlp", samples=2, noise=0.5).window == 1


@pytest.mark.parametrize("kind", KINDS)
def test_file_names(kind: str) -> None:
    assert kind_of_file(f"knowledge_12{KINDS[kind].suffix}").name == kind


@pytest.mark.parametrize("kinds", [[], ["state", "state"], ["heads"], [None], [["mlp"]]])
def test_kinds_that_are_none(kinds) -> None:
    with pytest.raises(ValueError, match="'state', 'mlp', 'attn'"):
        kinds_of(kinds)
    with pytest.raises(TypeError, match="kinds is the string 'mlp'"):
        kinds_of("mlp")
