"""The loop over layers neither waits for the device nor sends it anything."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.model.hooks import resting
from knowedit_ext.sweep import Interventions, clean_run, engine
from knowedit_ext.sweep.attention import tree_attention_in
from knowedit_ext.sweep.plan import plan_of
from knowedit_ext.tracing import cells

from ..support.fake_gpu import Watch, fake_gpu
from ..support.families import LAYERS, tiny_model

SHAPE = dict(tokens=6, first=1, copies=2, readout=range(5, 6), cells=tuple(range(6)), window=2, second=False, low=False)


def watch_sweep(family: str, kinds=("state", "mlp", "attn"), sever=None) -> Watch:
    """What passes between host and device within the layers of a trace."""
    asked = Interventions()
    cells.add_cells(asked, 0, cells.Shape(layers=LAYERS, sever=sever, **SHAPE), kinds)
    (one,) = plan_of(asked, [6], [torch.device("cpu")] * LAYERS, 1000).passes
    watch = Watch()
    with fake_gpu(tiny_model(family)) as model, resting(model):
        clean, one = clean_run(model, list(range(3, 9))), one.on([torch.device("cuda")] * LAYERS)
        rows = torch.cat([clean.hidden[0], *[clean.hidden[0, 1:]] * 2])
        with tree_attention_in(model.modules), watch:
            out = engine._through_the_layers(model, [clean], rows, one)
        assert out.shape == (one.layout.rows[-1], model.hidden_size) and out.device.type == "cuda"
    return watch


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "llama", "mistral", "gemma2", "gemma3_text", "phi3"])
def test_a_sweep_does_not_wait(family: str) -> None:
    watch = watch_sweep(family)
    assert not watch.waits and not watch.sent


def test_severed_paths_do_not_wait() -> None:
    watch = watch_sweep("gpt2", ("state",), "attn")
    assert not watch.waits and not watch.sent


FAULTS = {
    "item": lambda x: x + float(x.sum()),
    "a boolean index": lambda x: x + x[x > 0].sum(),
    "nonzero": lambda x: x + len((x > 0).nonzero()),
    "a copy to the host": lambda x: x + x.cpu().to(x.device),
    "a tensor made on the host": lambda x: x + torch.ones(1).to(x.device),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_wait_is_found(fault: str, monkeypatch) -> None:
    """Planted in every layer; what asks for numbers cannot go on without them."""
    real = engine._bear
    monkeypatch.setattr(engine, "_bear", lambda hidden, *rest: FAULTS[fault](real(hidden, *rest)))
    watches = []
    monkeypatch.setattr(Watch, "__enter__", lambda self, own=Watch.__enter__: watches.append(self) or own(self))
    went_on = False
    with suppress(RuntimeError):
        watch_sweep("gpt2")
        went_on = True
    (watch,) = watches
    assert watch.waits or watch.sent or not went_on


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_sweep_on_cuda_does_not_wait(family: str, monkeypatch) -> None:
    tiny = tiny_model(family)
    model = ke.load_model((copy.deepcopy(tiny.hf), tiny.tokenizer), device="cuda")
    trace = lambda: ke.trace(model, ke.Fact("w5 {} w7 w9", "w3 w8"), "mlp", samples=2, noise=0.3, window=2)  # noqa: E731
    trace()  # kernels are loaded, and the allocator has what it needs
    real = engine._through_the_layers

    def strict(*given):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine, "_through_the_layers", strict)
    trace()
