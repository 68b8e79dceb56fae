"""What layers get of each token beside the states (Gemma 4 E2B): by its id, and by its embedding as noised."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import knowedit_ext as ke
from knowedit_ext.sweep import capture
from knowedit_ext.sweep.capture import clean_runs
from knowedit_ext.sweep.newborn import NewbornRows
from knowedit_ext.sweep.probe import probe

from ..support.families import VOCAB, tiny_hf
from ..support.more_families import more_model
from ..support.oracle import plain_trace
from ..support.tokenizers import word_level
from ..tracing.test_against_the_loop import CASES, FACTS, IDS, NOISE, SAMPLES, assert_equal, noisy

pytestmark = [
    pytest.mark.filterwarnings("ignore:corrupting"),
    pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="this transformers has no Gemma 4"),
]


@cache
def model() -> ke.EditableModel:
    return more_model("gemma4_text", hidden_size_per_layer_input=6, vocab_size_per_layer_input=VOCAB)


@pytest.mark.parametrize("kind, window, sever", CASES[1::2])
def test_traces_in_one_sweep_and_in_many(kind: str, window: int, sever: str | None) -> None:
    asked = dict(kind=kind, window=window, sever=sever, samples=SAMPLES, noise=NOISE)
    for max_rows in (None, 40):
        for number, got in enumerate(ke.trace(model(), FACTS, max_rows=max_rows, **asked)):
            assert_equal(got, plain_trace(model().hf, IDS[number], noisy(number), got.answer_ids, kind, window, sever))


def test_rows_born_in_an_mlp() -> None:
    """They are the clean run's where nothing is taken from them."""
    rows = NewbornRows(model(), clean_runs(model(), IDS[:2]), [(0, 6), (1, 4)])
    born = rows.run([0, 1, 2, 3], torch.ones(1))
    clean = born.states[:2].repeat(4, 1)
    torch.testing.assert_close(born.states[2:], clean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fault", ["clean", "neighbours", "none"])
def test_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = capture.RowArguments.__init__

    def wrong(self, runs, index, inputs=None, origin=None):
        if fault == "none":
            inputs = torch.zeros_like(inputs)
        elif fault == "clean":  # the first rows of a sweep are those of the clean run
            places = torch.cat([torch.arange(len(run.ids)) for run in runs])
            origin = places[index.cpu()]
        else:
            origin = (origin - 1).clamp(min=0)
        right(self, runs, index, inputs, origin)

    monkeypatch.setattr(capture.RowArguments, "__init__", wrong)
    model().probed = False
    with pytest.raises(ke.UnsupportedModelError, match="the logits of a sweep are off by"):
        probe(model())


@pytest.mark.parametrize("since", [0, 1])
def test_what_layers_make_for_each_other_is_refused(since: int) -> None:
    """The same shape, but a patch of a layer would change it."""
    loaded, last = ke.load_model((tiny_hf("llama"), word_level(VOCAB))), []

    class Handing(LlamaDecoderLayer):
        def __call__(self, hidden_states: torch.Tensor, **kwargs):
            number = self.self_attn.layer_idx
            memory = last[-1] if number else torch.zeros_like(hidden_states)
            out = super().__call__(hidden_states, **kwargs | ({"memory": memory} if number >= since else {}))
            last.append(out)
            return out

        def forward(self, hidden_states: torch.Tensor, memory: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
            out = super().forward(hidden_states, **kwargs)
            return out if memory is None else out + 0.1 * memory

    for layer in loaded.modules.layers:
        layer.__class__ = Handing
    with pytest.raises(ke.UnsupportedModelError, match="hangs on what layers before them do"):
        probe(loaded)
