"""More tokens than a folder's moments are over: gone on from what is kept, to the bits of the larger collection."""

from __future__ import annotations

import itertools
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from moments.test_collect import texts
from support.families import tiny_hf, tiny_model, under_config
from support.tokenizers import word_level

import knowedit_ext as ke

from ..support.processes import full_disk, hashes
from .test_resume import WORKER, Interrupted, layer_files, two_ranks, worker

COMMON = dict(texts=texts(60), layers=[1, 3], batch_tokens=60, progress=False)
WHOLE = 10**6


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knowedit_ext.moments.collect.GROUP", 13)


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def tokens(model) -> int:
    """Of the whole text."""
    return ke.collect_moments(model, **COMMON)[1].count


def loaded(**options) -> ke.EditableModel:
    return ke.load_model((tiny_hf("gpt2"), word_level()), **options)


def counted(model: ke.EditableModel):
    ran = []
    return ran, model.modules.layers[0].register_forward_pre_hook(lambda *a: ran.append(1))


def collect(model, out: Path | None, limit: int | None, **more) -> tuple[ke.Moments, int]:
    """And how often the model ran."""
    ran, hook = counted(model)
    try:
        return ke.collect_moments(model, max_tokens=limit, out=out, **COMMON | more), len(ran)
    finally:
        hook.remove()


@pytest.mark.parametrize("first, then", [(300, 700), (150, 151), (20, 500), (450, None), (600, WHOLE), (777, 778)])
def test_enlarged_to_the_bytes_of_the_large_one(model, tmp_path: Path, first: int, then: int | None) -> None:
    collect(model, tmp_path / "grown", first)
    _, runs = collect(model, tmp_path / "grown", then)
    _, fresh = collect(model, tmp_path / "once", then)
    assert hashes(tmp_path / "grown") == hashes(tmp_path / "once")
    assert runs < fresh or first < 200  # of a single group nothing is kept
    assert collect(model, tmp_path / "grown", then)[1] == 0


def test_step_by_step(model, tmp_path: Path, tokens: int) -> None:
    """Through limits that cut a group, that end one and that are behind the text."""
    ends = list(itertools.accumulate(group_tokens(model)))
    for limit in (ends[0] - 1, ends[0], ends[0] + 1, ends[1], ends[2] - 1, ends[3], tokens, tokens + 1, None):
        collect(model, tmp_path / "grown", limit)
        collect(model, tmp_path / str(limit), limit)
        assert hashes(tmp_path / "grown") == hashes(tmp_path / str(limit)), limit
    assert not (tmp_path / "grown" / "checkpoint").exists()


def group_tokens(model) -> list[int]:
    counts = [len(ids) for ids in model.tokenizer(COMMON["texts"])["input_ids"]]
    return [sum(counts[n : n + 13]) for n in range(0, len(counts), 13)]


def test_each_layer_goes_on_from_its_own(model, tmp_path: Path) -> None:
    collect(model, tmp_path / "grown", 300, layers=[1])
    collect(model, tmp_path / "grown", 600, layers=[3])
    both, _ = collect(model, tmp_path / "grown", 800)
    want, _ = collect(model, tmp_path / "once", 800)
    assert both.layers == [1, 3] and hashes(tmp_path / "grown") == hashes(tmp_path / "once")
    again, _ = collect(model, tmp_path / "grown", 900, layers=[0, 1, 3])
    once, _ = collect(model, tmp_path / "three", 900, layers=[0, 1, 3])
    assert all(torch.equal(again[n].mean, once[n].mean) for n in (0, 1, 3))
    assert layer_files(tmp_path / "grown") == layer_files(tmp_path / "three")


@pytest.mark.parametrize("runs", [1, 3, 6, 9, 12, 15])
def test_interrupted_while_it_is_enlarged(model, tmp_path: Path, runs: int) -> None:
    """Before, in and behind the group that the smaller one cut; also when it never was finished."""
    collect(model, tmp_path / "grown", 400)
    for limit, out in ((800, tmp_path / "grown"), (400, tmp_path / "never")):
        calls = itertools.count()

        def stop(*ignored, calls=calls) -> None:
            if next(calls) >= runs:
                raise Interrupted

        hook = model.modules.layers[0].register_forward_pre_hook(stop)
        with suppress(Interrupted):
            ke.collect_moments(model, max_tokens=limit, out=out, checkpoint_seconds=0.0, **COMMON)
        hook.remove()
    collect(model, tmp_path / "grown", 800)
    collect(model, tmp_path / "never", 800)
    collect(model, tmp_path / "once", 800)
    assert hashes(tmp_path / "grown") == hashes(tmp_path / "never") == hashes(tmp_path / "once")


def test_less_is_refused_and_less_than_the_limit_is_the_same(model, tmp_path: Path, tokens: int) -> None:
    collect(model, tmp_path, 400)
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match="max_tokens: 400 there, 300 asked"):
        collect(model, tmp_path, 300)
    assert hashes(tmp_path) == before
    whole, _ = collect(model, tmp_path, None)
    before = hashes(tmp_path)
    served, runs = collect(model, tmp_path, tokens + 5)  # the text has no more
    assert not runs and hashes(tmp_path) == before and torch.equal(served[1].mean, whole[1].mean)
    with pytest.raises(ValueError, match=f"max_tokens: None there, {tokens - 1} asked"):
        collect(model, tmp_path, tokens - 1)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(texts=texts(60, seed=1)), "another text"),
        (dict(batch_tokens=70), "batch_tokens: 60 there, 70 asked"),
        (dict(model=lambda: ke.load_model((tiny_hf("gpt2", 1), word_level()))), "has other values"),
        (
            dict(model=lambda: ke.load_model((under_config(tiny_hf("gpt2"), n_head=1), word_level()))),
            "config.n_head: 4 there, 1 asked",
        ),
        (
            dict(model=lambda: ke.load_model((tiny_hf("gpt2"), word_level()), dtype="bfloat16")),
            "is bfloat16, was float32",
        ),
        (
            dict(model=lambda: ke.load_model((tiny_hf("gpt2"), word_level()), precision="tf32")),
            "precision: nothing there",
        ),
    ],
)
def test_only_of_the_same_thing(model, tmp_path: Path, change: dict, message: str) -> None:
    collect(model, tmp_path, 400)
    before = hashes(tmp_path)
    other = change["model"]() if "model" in change else model
    more = {key: value for key, value in change.items() if key != "model"}
    for limit in (400, 800):
        with pytest.raises(ValueError, match=message):
            collect(other, tmp_path, limit, **more)
    assert hashes(tmp_path) == before


def test_what_is_kept_is_looked_at(model, tmp_path: Path) -> None:
    collect(model, tmp_path, 400)
    [path] = (tmp_path / "checkpoint").glob("layer_1_*")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name}' was altered"):
        collect(model, tmp_path, 800)
    shutil.rmtree(tmp_path / "checkpoint")
    collect(model, tmp_path, 800)  # from the beginning
    collect(model, tmp_path / "once", 800)
    assert layer_files(tmp_path) == layer_files(tmp_path / "once")


def test_a_full_disk_at_any_file(model, tmp_path: Path) -> None:
    collect(model, tmp_path / "once", 800)
    collect(model, tmp_path / "out", 400)
    for after in (0, 1, 2, 1, 0):  # each goes on where the last one met it
        with full_disk(after), pytest.raises(OSError, match=f"No space left on device.*{tmp_path}"):
            collect(model, tmp_path / "out", 800, checkpoint_seconds=0.0)
        assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "out" / ".lock").exists()
    collect(model, tmp_path / "out", 800)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "once")


@pytest.mark.parametrize("after", range(12))
def test_a_full_disk_at_the_result(model, tmp_path: Path, after: int) -> None:
    """What is there of the smaller collection is its own, or gone; never a tensor with the other's sidecar."""
    collect(model, tmp_path / "out", 400)
    with full_disk(after), suppress(OSError):
        collect(model, tmp_path / "out", 800)
    for path in (tmp_path / "out").glob("layer_*.json"):
        assert ke.Moments.load(tmp_path / "out", [int(path.stem[6:])]).layers
    collect(model, tmp_path / "out", 800)
    collect(model, tmp_path / "once", 800)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "once")


def test_two_ranks_and_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("torch.set_num_threads(1)", "torch.set_num_threads(1)\nGROUP"))
    text = script.read_text().replace("GROUP", "import knowedit_ext.moments.collect as c; c.GROUP = 13")
    script.write_text(text)
    for limits, out in (((400, 800), "grown"), ((800,), "once")):
        options = [dict(out=str(tmp_path / out), max_tokens=limit) for limit in limits]
        two_ranks(str(script), *options)
    assert hashes(tmp_path / "grown") == hashes(tmp_path / "once")
    first = worker(str(script), dict(out=str(tmp_path / "busy")), slow=3.0)
    while not (tmp_path / "busy" / "checkpoint").exists():
        assert first.poll() is None
    assert worker(str(script), dict(out=str(tmp_path / "busy"))).wait() == 1
    assert first.poll() is None
    first.kill()
    first.wait()
    assert worker(str(script), dict(out=str(tmp_path / "busy"))).wait() == 0
