"""A collection that is killed goes on to the same bits; ranks agree with one process; what is finished stays."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from moments.test_collect import texts
from safetensors.torch import load_file
from support.families import tiny_hf, tiny_model
from support.tokenizers import word_level

import knowedit_ext as ke

from ..support.forked import Forked, Ranks
from ..support.processes import finish

WORKER = """
import json, sys, time
import torch
import knowedit_ext as ke
from moments.test_collect import texts
from support.families import tiny_hf
from support.tokenizers import word_level

torch.set_num_threads(1)
hf = tiny_hf("gpt2")
hf.transformer.h[0].register_forward_hook(lambda *a: time.sleep(float(sys.argv[1])))
model = ke.load_model((hf, word_level()))
for options in json.loads(sys.argv[2]):
    ke.collect_moments(model, texts(120), [0, 2], batch_tokens=50, checkpoint_seconds=0.0, progress=False, **options)
"""


def worker(script: str, *options: dict, slow: float = 0.0) -> Forked:
    return Forked([script, str(slow), json.dumps(options)], Path(script).parent)


def two_ranks(script: str, *options: dict) -> None:
    finish(Ranks([script, "0.0", json.dumps(options)], Path(script).parent))


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("worker") / "worker.py"
    path.write_text(WORKER)
    return str(path)


@pytest.fixture
def one_thread():
    """Sums depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def here(**options) -> ke.Moments:
    """What the worker does, in this process."""
    model, common = tiny_model("gpt2"), dict(batch_tokens=50, checkpoint_seconds=0.0, progress=False)
    return ke.collect_moments(model, texts(120), [0, 2], **common, **options)


def layer_files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("layer_*"))}


def test_killed_at_any_moment(tmp_path, script, one_thread):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = worker(script, dict(out=str(killed)), slow=0.05)
    checkpoint = killed / "checkpoint" / "rank0of1.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.25)
    process.kill()
    process.wait()
    assert checkpoint.exists() and not layer_files(killed)
    here(out=whole)
    here(out=killed)
    assert layer_files(killed) == layer_files(whole) and len(layer_files(whole)) == 4
    assert {p.name for p in killed.iterdir()} == set(layer_files(killed))  # nothing else is left


class Interrupted(Exception):
    pass


def interrupted(model: ke.EditableModel, after: int, **arguments) -> None:
    """Collect until the model was run `after` times."""
    calls = []

    def count(*ignored) -> None:
        calls.append(1)
        if len(calls) > after:
            raise Interrupted

    hook = model.modules.layers[0].register_forward_pre_hook(count)
    with pytest.raises(Interrupted):
        ke.collect_moments(model, checkpoint_seconds=0.0, progress=False, **arguments)
    hook.remove()


@pytest.mark.parametrize("options", [{}, {"stop": "tolerance", "tolerance": 0.99}, {"max_tokens": 500}])
def test_interrupted_after_every_batch(tmp_path, monkeypatch, options):
    monkeypatch.setattr("knowedit_ext.moments.collect.GROUP", 13)
    model = tiny_model("gpt2")
    common = dict(texts=texts(60), layers=[1, 3], batch_tokens=60) | options
    for _ in range(6):
        interrupted(model, after=2, out=tmp_path, **common)
    ran = []
    hook = model.modules.layers[0].register_forward_pre_hook(lambda *a: ran.append(1))
    got = ke.collect_moments(model, **common, out=tmp_path, progress=False)
    resumed = len(ran)
    want = ke.collect_moments(model, **common, progress=False)
    hook.remove()
    assert resumed <= len(ran) - resumed - 6  # each interrupted run got on by a batch at least
    for layer in (1, 3):
        assert torch.equal(got[layer].mean, want[layer].mean)
        assert (got[layer].count, got[layer].missing) == (want[layer].count, want[layer].missing)
        assert got[layer].origin == want[layer].origin


def test_what_is_finished_is_not_collected_again(tmp_path):
    model, common = tiny_model("gpt2"), dict(texts=texts(10), out=tmp_path, progress=False)
    first = ke.collect_moments(model, layers=[1], **common)
    before = layer_files(tmp_path)
    ran = []
    hook = model.modules.layers[0].register_forward_hook(lambda *a: ran.append(1))
    again = ke.collect_moments(model, layers=[1], **common)
    assert not ran and torch.equal(first[1].mean, again[1].mean)
    both = ke.collect_moments(model, layers=[1, 2], **common)
    hook.remove()
    assert ran and both.layers == [1, 2]
    assert {n: b for n, b in layer_files(tmp_path).items() if "layer_1" in n} == before
    assert torch.equal(ke.Moments.load(tmp_path)[2].mean, both[2].mean)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(texts=texts(10, seed=1)), "another text"),
        (dict(texts=texts(11)), "another text"),
        (dict(texts=texts(9)), "another text"),
        (dict(batch_tokens=99), "batch_tokens: 8192 there, 99 asked"),
        (dict(model=ke.load_model((tiny_hf("gpt2", seed=1), word_level()))), "has other values"),
        (dict(model=ke.load_model((tiny_hf("gpt2"), word_level(58)))), "another tokenizer"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path, change, message):
    common = dict(model=tiny_model("gpt2"), texts=texts(10), layers=[1], out=tmp_path, progress=False)
    ke.collect_moments(**common)
    before = layer_files(tmp_path)
    with pytest.raises(ValueError, match=message):
        ke.collect_moments(**(common | change))
    assert layer_files(tmp_path) == before


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    common = dict(texts=texts(10), layers=[1], out=tmp_path, batch_tokens=30)
    interrupted(tiny_model("gpt2"), after=3, **common)
    with pytest.raises(ValueError, match="batch_tokens: 30 there, 40 asked"):
        ke.collect_moments(tiny_model("gpt2"), **(common | {"batch_tokens": 40}), progress=False)
    with pytest.raises(ValueError, match="over another text"):
        ke.collect_moments(tiny_model("gpt2"), **(common | {"texts": texts(10, seed=2)}), progress=False)
    path = tmp_path / "checkpoint" / "rank0of1.safetensors"
    path.rename(path.with_name("rank0of2.safetensors"))
    with pytest.raises(ValueError, match="another number of ranks"):
        ke.collect_moments(tiny_model("gpt2"), **common, progress=False)
    path.with_name("rank0of2.safetensors").unlink()
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        ke.collect_moments(tiny_model("gpt2"), **common, progress=False)


def test_two_ranks_agree_with_one(tmp_path, script):
    settings = {"all": {}, "settled": {"stop": "tolerance", "tolerance": 0.9}}
    options = [dict(out=str(tmp_path / name), **more) for name, more in settings.items()]
    two_ranks(script, *options)
    for name, more in settings.items():
        one, two = here(**more), ke.Moments.load(tmp_path / name)
        for layer in (0, 2):
            alone, shared = one[layer], two[layer]
            assert shared.count == alone.count and shared.origin == alone.origin
            assert float((shared.mean - alone.mean).abs().max() / alone.mean.abs().max()) < 1e-6
            assert shared.missing == (pytest.approx(alone.missing, rel=1e-3) if more else None)
        assert not (tmp_path / name / "checkpoint").exists()
        tensors = load_file(tmp_path / name / "layer_0.safetensors")
        assert set(tensors) == {"mean"} and tensors["mean"].dtype == torch.float64
