"""`Trace` on disk: the published keys, equal bytes, whole or not there, and clear errors for what is no trace."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest

import knowedit_ext as ke
from knowedit_ext.runs.files import save_npz

from ..support.families import tiny_model

FACT = ke.Fact("w5 w6 {} w9 w10 w11", "w3 w7", target=" w20 w21")
PUBLISHED = {
    "scores": (np.float32, 2),
    "low_score": (np.floating, 0),
    "high_score": (np.floating, 0),
    "input_ids": (np.integer, 1),
    "input_tokens": (np.str_, 1),
    "subject_range": (np.integer, 1),
    "answer": (np.str_, 0),
    "window": (np.integer, 0),
    "correct_prediction": (np.bool_, 0),
    "kind": (np.str_, 0),
}


@pytest.fixture(params=["state", "mlp"], scope="module")
def trace(request) -> ke.Trace:
    return ke.trace(tiny_model("gpt2"), FACT, kind=request.param, window=3, samples=2, noise=0.5)


def test_round_trip(trace, tmp_path) -> None:
    trace.save(tmp_path / "deep" / "trace.npz")
    back = ke.Trace.load(tmp_path / "deep" / "trace.npz")
    for name in ("scores", "sample_scores", "low_samples", "input_ids"):
        np.testing.assert_array_equal(getattr(back, name), getattr(trace, name))
        assert getattr(back, name).dtype == getattr(trace, name).dtype
    for name in ("low_score", "high_score", "answer", "answer_ids", "tokens", "subject_range", "kind", "window"):
        assert getattr(back, name) == getattr(trace, name), name
    assert back.correct_prediction is True and back.settings == json.loads(json.dumps(trace.settings))
    np.testing.assert_array_equal(back.standard_error, trace.standard_error)
    assert back.settings["seed"] == 1 and back.settings["noise"] == 0.5 and back.settings["sever"] is None


def test_published_keys_without_pickle(trace, tmp_path) -> None:
    trace.save(tmp_path / "trace.npz")
    with np.load(tmp_path / "trace.npz", allow_pickle=False) as file:
        for name, (kind, dimensions) in PUBLISHED.items():
            assert np.issubdtype(file[name].dtype, kind) and file[name].ndim == dimensions, name
        assert file["scores"].shape == (7, 4) and str(file["kind"]) == ("" if trace.kind == "state" else "mlp")
        assert not any(file[name].dtype.hasobject for name in file.files)


def test_chosen_cells_survive(tmp_path) -> None:
    got = ke.trace(tiny_model("gpt2"), FACT, samples=2, noise=0.5, tokens=np.arange(2, 4))
    got.save(tmp_path / "t.npz")
    np.testing.assert_array_equal(ke.Trace.load(tmp_path / "t.npz").scores, got.scores)


def test_equal_traces_are_equal_bytes(trace, tmp_path) -> None:
    again = ke.trace(tiny_model("gpt2"), FACT, kind=trace.kind, window=3, samples=2, noise=0.5)
    trace.save(tmp_path / "a.npz")
    again.save(tmp_path / "b.npz")
    ke.Trace.load(tmp_path / "a.npz").save(tmp_path / "c.npz")
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b == c


def test_a_published_file(tmp_path) -> None:
    """Saved by the published code: fewer keys, kind None as an object array is not to be read, "" and "mlp" are."""
    scores = np.random.RandomState(0).rand(3, 2)
    np.savez(
        tmp_path / "knowledge_1.npz",
        **dict(scores=scores, low_score=0.1, high_score=0.9, input_ids=np.arange(3), input_tokens=["a", "b", "c"]),
        **dict(subject_range=(0, 2), answer=" x", window=10, correct_prediction=True, kind=""),
    )
    got = ke.Trace.load(tmp_path / "knowledge_1.npz")
    np.testing.assert_array_equal(got.scores, scores.astype(np.float32))
    assert (got.kind, got.window, got.subject_range, got.answer) == ("state", 10, (0, 2), " x")
    assert got.low_samples.shape == (0,) and np.isnan(got.standard_error).all()


# -- interrupted and damaged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 3, 10])
def test_an_interrupted_save_leaves_the_old_file(trace, tmp_path, monkeypatch, after: int) -> None:
    path = tmp_path / "trace.npz"
    trace.save(path)
    before, write, calls = path.read_bytes(), np.lib.format.write_array, []

    def interrupted(*args, **kwargs) -> None:
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        write(*args, **kwargs)

    monkeypatch.setattr(np.lib.format, "write_array", interrupted)
    for target in (path, tmp_path / "new.npz"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            trace.save(target)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["trace.npz"]


def test_damaged_files_are_named(trace, tmp_path) -> None:
    path = tmp_path / "trace.npz"
    trace.save(path)
    whole = path.read_bytes()
    for length in [0, 1, 10, *range(40, len(whole) - 1, 97)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(f"'{path}'")):
            ke.Trace.load(path)


def test_flipped_bytes_give_the_same_trace_or_an_error(trace, tmp_path) -> None:
    """A checksum covers the arrays; what it does not cover changes nothing."""
    path = tmp_path / "trace.npz"
    trace.save(path)
    whole, generator = path.read_bytes(), np.random.RandomState(0)
    for at in generator.randint(0, len(whole), 150):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << generator.randint(8)
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(ke.Trace.load(path).scores, trace.scores)
        except ValueError as error:
            assert str(path) in str(error)


GOOD = dict(
    scores=np.zeros((3, 2), np.float32),
    low_score=0.1,
    high_score=0.9,
    input_tokens=np.array(["a", "b", "c"]),
    subject_range=np.array([0, 2]),
    answer=np.array(" x"),
)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scores=None, answer=None), "lacks scores, answer"),
        (dict(scores=np.zeros(3)), r"scores is float64 \[3\]"),
        (dict(scores=np.zeros((4, 2))), r"scores \[4, 2\] for 3 tokens"),
        (dict(scores=None, correct_prediction=False), "did not predict the expected attribute"),
        (dict(subject_range=np.array([0, 1, 2])), "subject_range"),
        (dict(subject_range=np.array([2, 7])), "subject_range"),
        (dict(settings=np.array("{")), "settings"),
        (dict(kind=np.array("heads")), "kind 'heads'"),
        (dict(low_score=np.array("low")), "low_score"),
        (dict(scores=np.array([["a", "b"]] * 3)), "scores is <U1"),
        (dict(scores=np.full((3, 2), np.nan)), "scores are no finite numbers"),
        (dict(scores=np.array([[np.nan, 0.5]] * 3)), "scores are no finite numbers"),
        (dict(scores=np.full((3, 2), np.inf)), "scores are no finite numbers"),
        (dict(scores=np.zeros((3, 0))), r"scores \[3, 0\]"),
        (dict(low_score=np.nan), "low_score is nan"),
        (dict(high_score=np.zeros(2)), r"high_score is float64 \[2\], expected numbers in 0 dimensions"),
        (dict(subject_range=np.array([0.0, 2.0])), "subject_range is float64"),
        (dict(input_tokens=np.array("abc")), "input_tokens is"),
        (dict(answer=np.array(3)), "answer is int64"),
        (dict(window=np.array(0)), "window 0"),
        (dict(window=np.array("3")), "window is"),
        (dict(correct_prediction=np.array([True, False])), "correct_prediction is"),
        (dict(sample_scores=np.zeros((2, 3, 3))), r"sample_scores \[2, 3, 3\]"),
        (dict(low_samples=np.zeros((2, 2))), "low_samples is"),
        (dict(answer_ids=np.array([0.5])), "answer_ids is"),
        (dict(settings=np.array("[]")), "settings is no JSON object"),
        (dict(settings=np.array("[" * 100_000)), "settings is no JSON object"),
    ],
)
def test_files_that_are_no_trace(tmp_path, change, message) -> None:
    path = tmp_path / "odd.npz"
    arrays = {k: np.asarray(v) for k, v in (GOOD | change).items() if v is not None}
    with open(path, "wb") as file:
        save_npz(file, arrays)
    with pytest.raises(ValueError, match=message) as caught:
        ke.Trace.load(path)
    assert str(path) in str(caught.value)


def test_pickles_are_refused(tmp_path) -> None:
    path = tmp_path / "pickled.npz"
    np.savez(path, **(GOOD | {"answer": np.array([{"x": 1}], dtype=object)}))
    with pytest.raises(ValueError, match="pickled.npz"):
        ke.Trace.load(path)


def test_other_files(tmp_path, trace) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("scores")
    (tmp_path / "folder.npz").mkdir()
    for name in ("array.npy", "text.npz", "folder.npz"):
        with pytest.raises(ValueError, match=name):
            ke.Trace.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        ke.Trace.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"trace.pt.*\.npz"):
        trace.save(tmp_path / "trace.pt")


def test_fixed_timestamps() -> None:
    first, second = io.BytesIO(), io.BytesIO()
    for file in (first, second):
        save_npz(file, GOOD | {"low_score": np.float64(0.1), "high_score": np.float64(0.9)})
    assert first.getvalue() == second.getvalue()
