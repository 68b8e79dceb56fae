"""Average effects against a plain re-computation, and the figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import knowedit_ext as ke
from knowedit_ext.tracing.kinds import KINDS
from knowedit_ext.tracing.roles import ROLES


def a_trace(tokens: int, subject: tuple[int, int], seed: int, kind: str = "state", layers: int = 5) -> ke.Trace:
    generator = np.random.RandomState(seed)
    return ke.Trace(
        scores=generator.rand(tokens, layers).astype(np.float32),
        low_score=float(generator.rand() / 4),
        high_score=float(0.5 + generator.rand() / 2),
        answer=" $x_1",
        answer_ids=(3,),
        tokens=[f" t{n}" for n in range(tokens)],
        input_ids=np.arange(tokens),
        subject_range=subject,
        kind=kind,
    )


# subject of one token, of four, at the end, followed by one token, in the middle
SHAPES = [(8, (0, 1)), (9, (2, 6)), (5, (2, 5)), (6, (1, 5)), (10, (3, 5))]


def test_roles_and_intervals() -> None:
    traces = [a_trace(tokens, subject, n) for n, (tokens, subject) in enumerate(SHAPES)]
    averages = ke.Effects.from_traces(traces).kinds["state"]
    for role in ROLES:
        values = []
        for t in traces:
            first, after = t.subject_range
            end = len(t.tokens) - 1
            positions = {
                "First subject token": [first],
                "Middle subject tokens": range(first + 1, after - 1),
                "Last subject token": [after - 1],
                "First subsequent token": [after] if after <= end else [],
                "Further tokens": range(after + 1, end),
                "Last token": [end],
            }[role]
            values += [t.scores[p].astype(np.float64) - t.low_score for p in positions]
        values = np.array(values)
        mean = averages.aie[role]
        assert mean.n == len(values)
        np.testing.assert_allclose(mean.mean, values.mean(0), atol=1e-6)
        np.testing.assert_allclose(mean.half_width, 1.96 * values.std(0, ddof=1) / np.sqrt(len(values)), atol=1e-6)
    assert averages.aie["First subsequent token"].n == 4  # one subject ends its prompt
    gaps = np.array([t.high_score - t.low_score for t in traces])
    assert averages.total_effect.mean == pytest.approx(gaps.mean())
    assert averages.total_effect.half_width == pytest.approx(1.96 * gaps.std(ddof=1) / np.sqrt(5))
    assert averages.highest.mean == pytest.approx(np.mean([t.scores.max() for t in traces]))


def test_one_trace_has_no_interval() -> None:
    effects = ke.Effects.from_traces([a_trace(6, (1, 3), 0)])
    assert effects.kinds["state"].total_effect.half_width is None
    assert "Last subject token" in effects.table() and "±" not in effects.table()


def test_tokens_that_were_not_traced_do_not_count() -> None:
    trace = a_trace(6, (1, 3), 0)
    trace.scores[:2] = trace.scores[3:] = np.nan  # as with tokens="subject_last"
    effects = ke.Effects.from_traces([trace]).kinds["state"]
    assert list(effects.aie) == ["Last subject token"]


def test_saved_and_loaded(tmp_path: Path) -> None:
    traces = [a_trace(*shape, n, kind) for n, shape in enumerate(SHAPES) for kind in ("state", "mlp")]
    effects = ke.Effects.from_traces(traces, {"mlp": 3})
    effects.save(tmp_path / "summary.json")
    assert ke.Effects.load(tmp_path / "summary.json") == effects
    assert effects.kinds["mlp"].skipped == 3
    with pytest.raises(ValueError, match="no knowledge_"):
        ke.Effects.from_folder(tmp_path)


def test_models_of_different_depth_do_not_mix() -> None:
    with pytest.raises(ValueError, match="different numbers of layers"):
        ke.Effects.from_traces([a_trace(6, (1, 3), 0), a_trace(6, (1, 3), 0, layers=7)])


def test_windows_do_not_mix_and_states_have_none() -> None:
    for kind in KINDS:
        traces = [a_trace(6, (1, 3), seed, kind) for seed in range(2)]
        traces[1].window = 3
        if KINDS[kind].windowed:
            with pytest.raises(ValueError, match=r"different windows: \[3, 10\]"):
                ke.Effects.from_traces(traces)
        else:
            assert ke.Effects.from_traces(traces).kinds[kind].window == 1


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figures(tmp_path: Path, suffix: str, magic: bytes) -> None:
    trace = a_trace(9, (2, 6), 1, "attn", layers=48)
    trace.tokens[3] = "\n$\\frac{$\ufffd"
    effects = ke.Effects.from_traces(
        [a_trace(*shape, n, k) for n, shape in enumerate(SHAPES) for k in ("state", "mlp")]
    )
    for name, draw in (
        ("trace", trace.plot),
        ("lines", effects.plot),
        ("heat", lambda path: effects.plot(path, style="heatmap")),
    ):
        path = tmp_path / f"{name}.{suffix}"
        draw(path)
        content = path.read_bytes()
        assert content.startswith(magic)
        draw(path)
        assert suffix == "svg" or path.read_bytes() == content  # no dates inside
    assert trace._repr_png_().startswith(b"\x89PNG")


def test_a_figure_shows_what_it_should() -> None:
    trace = a_trace(9, (2, 6), 1, "mlp")
    axes = trace.plot().axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert [label.endswith("*") for label in labels] == [2 <= n < 6 for n in range(9)]
    np.testing.assert_array_equal(axes.collections[0].get_array().reshape(9, 5), trace.scores)


def bar_limits(bar) -> tuple[float, float]:
    return tuple(np.round(bar.get_ylim(), 6))


@pytest.mark.parametrize("shift", [-2.0, -0.5, 0.0, 0.5, 2.0])
def test_negative_effects_are_seen_and_scales_are_centred(shift: float) -> None:
    """Zero is the neutral middle colour of every panel, equal effects are equally strong, nothing is cut off."""
    traces = [a_trace(*shape, n, kind) for n, shape in enumerate(SHAPES) for kind in KINDS]
    for number, trace in enumerate(traces):
        trace.scores = trace.scores / (1 + number % 3) + np.float32(shift)
    trace = traces[1]
    [mesh] = trace.plot().axes[0].collections
    reach = np.abs(trace.indirect_effect).max()
    np.testing.assert_allclose(mesh.get_clim(), [trace.low_score - reach, trace.low_score + reach], rtol=1e-5)
    low, high = min(trace.scores.min(), trace.low_score), max(trace.scores.max(), trace.low_score)
    np.testing.assert_allclose(bar_limits(trace.plot().axes[1]), [low, high], atol=1e-5)

    effects = ke.Effects.from_traces(traces)
    figure = effects.plot(style="heatmap")
    panels, bars = figure.axes[: len(KINDS)], figure.axes[len(KINDS) :]
    maps = [np.array([mean.mean for mean in kind.aie.values()]) for kind in effects.kinds.values()]
    reach = max(np.abs(values).max() for values in maps)
    for axes, values in zip(panels, maps, strict=True):
        [mesh] = axes.collections
        np.testing.assert_allclose(mesh.get_array().reshape(values.shape), values)
        np.testing.assert_allclose(mesh.get_clim(), [-reach, reach])
        colour = lambda value, mesh=mesh: np.array(mesh.to_rgba(value)[:3])  # noqa: E731
        assert colour(0.0).min() > 0.95  # white
        assert np.abs(colour(reach / 2) - colour(-reach / 2)).max() > 0.2
    assert len({bar_limits(bar) for bar in bars}) == 1 == len({axes.get_ylim() for axes in panels})


def test_what_was_not_traced_is_not_white() -> None:
    trace = a_trace(6, (1, 3), 0)
    trace.scores[2:] = np.nan
    axes = trace.plot().axes[0]
    assert axes.collections[0].get_array().mask.sum() == 4 * 5 and axes.get_facecolor()[:3] == (0.85,) * 3
    trace.scores[:] = trace.low_score  # and a trace without any effect has a scale all the same
    low, high = trace.plot().axes[0].collections[0].get_clim()
    assert low < trace.low_score < high


def test_bad_figure_requests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=".png, .pdf or .svg"):
        a_trace(6, (1, 3), 0).plot(tmp_path / "x.bmp")
    with pytest.raises(ValueError, match="unknown style"):
        ke.Effects.from_traces([a_trace(6, (1, 3), 0)]).plot(style="bars")
    with pytest.raises(ValueError, match="no traces"):
        ke.Effects().plot(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def saved(tmp_path: Path) -> tuple[Path, dict]:
    traces = [a_trace(*shape, n, kind) for n, shape in enumerate(SHAPES) for kind in ("state", "mlp")]
    path = tmp_path / "summary.json"
    ke.Effects.from_traces(traces).save(path)
    return path, json.loads(path.read_text())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda summary: summary.update(heads=summary["mlp"] | {"kind": "heads"}), "heads is no averages"),
        (lambda summary: summary.update(mlp=[]), "mlp is no averages"),
        (lambda summary: summary["mlp"].pop("cases"), "mlp is no averages"),
        (lambda summary: summary["mlp"].update(more=1), "mlp is no averages"),
        (lambda summary: summary["mlp"].update(kind=["mlp"]), "mlp is no averages"),
        (lambda summary: summary["mlp"].update(cases=-1), "mlp.cases is -1: expected at least 0"),
        (lambda summary: summary["mlp"].update(window="many"), "mlp.window is 'many'"),
        (lambda summary: summary["mlp"].update(highest=0.5), "mlp.highest is 0.5: expected an object"),
        (lambda summary: summary["mlp"]["highest"].pop("n"), "mlp.highest is .*: expected an object"),
        (lambda summary: summary["mlp"]["highest"].update(mean=float("nan")), "mlp.highest.mean is nan"),
        (lambda summary: summary["mlp"]["highest"].update(mean=[1.0]), "mlp.highest.mean is"),
        (lambda summary: summary["mlp"].update(aie={}), "mlp.aie has not the roles"),
        (
            lambda summary: summary["mlp"]["aie"].update(verb=summary["mlp"]["aie"]["Last token"]),
            "mlp.aie has not the roles",
        ),
        (lambda summary: summary["mlp"]["aie"]["Last token"]["mean"].pop(), "Last token has 4 means and 5 half widths"),
        (lambda summary: summary["mlp"]["aie"]["Last token"].update(mean=[0.5], half_width=None), "numbers of layers"),
        (lambda summary: summary["mlp"]["aie"]["Last token"].update(mean=[], half_width=None), "has 0 means"),
    ],
)
def test_averages_that_are_something_else(tmp_path: Path, change, message: str) -> None:
    path, summary = saved(tmp_path)
    change(summary)
    path.write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=f"summary.json': .*{message}"):
        ke.Effects.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_averages_that_are_no_json(tmp_path: Path, content: bytes) -> None:
    path, _ = saved(tmp_path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="summary.json'"):
        ke.Effects.load(path)
