"""What is kept of a history gives, whatever histories come after each other, what explicit inverses give for each."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import knowedit_ext as ke
from knowedit_ext.editing import deflation
from knowedit_ext.editing import metric as metric_file
from knowedit_ext.editing.metric import NullSpace, Plain, Preserving, solve_in_keys

WIDTH, LAYER = 14, 3
NAMES = ("preserving", "with mu", "null space", "small null space", "plain")


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(scale: float = 1.0) -> ke.Moments:
    sample = draw(0, 90, WIDTH) * torch.logspace(-2, 1, WIDTH, dtype=torch.float64) * scale
    return ke.Moments.from_arrays({LAYER: (sample.T @ sample / len(sample), len(sample))})


def metric_of(name: str, of: ke.Moments):
    c, eye = of[LAYER].mean, torch.eye(WIDTH, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(c)

    def projection(threshold: float) -> torch.Tensor:
        low = vectors[:, values < threshold]
        assert 0 < low.shape[1] < WIDTH
        return low @ low.T

    return {
        "preserving": lambda: (Preserving(of, 7.0), (7 * c).inverse()),
        "with mu": lambda: (Preserving(of, 7.0, mu=0.4), (7 * c + 0.4 * eye).inverse()),
        "null space": lambda: (NullSpace(of, 0.6, 0.5), projection(0.5) / 0.6),
        "small null space": lambda: (NullSpace(of, 0.6, 1e-3), projection(1e-3) / 0.6),
        "plain": lambda: (Plain(0.3), eye / 0.3),
    }[name]()


def expected(n: torch.Tensor, keys: torch.Tensor, earlier: Sequence[torch.Tensor], epsilon: float = 1.0):
    a = torch.cat([*(block.double() for block in earlier), keys.double()], 1)
    return (n @ a @ (epsilon * torch.eye(a.shape[1], dtype=torch.float64) + a.T @ n @ a).inverse())[:, -keys.shape[1] :]


def agrees(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).norm() <= 1e-8 * want.norm())


EDITS = [draw(10 + number, WIDTH, count).float() for number, count in enumerate((1, 2, 3, 1, 2))]
histories = st.lists(st.lists(st.sampled_from(range(len(EDITS))), max_size=7), min_size=1, max_size=8)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(histories)
def test_any_history_behind_any_other(name: str, asked: list[list[int]]) -> None:
    """Grown, cut, reverted out of order, redone, folded: 0 to 21 columns where 7 are folded."""
    metric, n = metric_of(name, moments())
    for number, history in enumerate(asked):
        earlier, keys = [EDITS[edit] for edit in history], draw(100 + number, WIDTH, 2)
        assert agrees(metric.solve(LAYER, keys, earlier), expected(n, keys, earlier))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_of_batches(name: str, device: str) -> None:
    """Each batch's keys are the next one's history; all is computed where the keys are, which edits keep on the CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    metric, n = metric_of(name, moments())
    earlier: list[torch.Tensor] = []
    for number in range(12):
        keys = draw(200 + number, WIDTH, 2).float()
        got = metric.solve(LAYER, keys.double().to(device), earlier)
        assert got.device.type == device and agrees(got.cpu(), expected(n, keys, earlier))
        earlier.append(keys)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "small null space"])  # of 3 dimensions
def test_exactly_behind_earlier_keys(name: str) -> None:
    metric, n = metric_of(name, moments())
    earlier: list[torch.Tensor] = []
    for number in range(4):
        keys = draw(300 + number, WIDTH, 1).float()
        got = solve_in_keys(metric, LAYER, keys.double(), earlier, epsilon=0.0)
        assert agrees(got, expected(n, keys, earlier, 0.0))
        earlier.append(keys)
    with pytest.raises(ValueError, match="5 keys.* cannot be told apart.*Leave out the earlier edit that is redone"):
        solve_in_keys(metric, LAYER, earlier[1].double(), earlier, epsilon=0.0)
    with pytest.raises(ValueError, match="cannot be told apart"):
        solve_in_keys(metric, LAYER, keys.double(), [*earlier, earlier[1]], epsilon=0.0)
    keys = draw(350, WIDTH, 1)
    assert agrees(solve_in_keys(metric, LAYER, keys, earlier[:2], 0.0), expected(n, keys, earlier[:2], 0.0))


def test_only_what_is_new_is_computed(monkeypatch) -> None:
    metric, n = metric_of("null space", moments())
    columns: list[int] = []
    apply = metric.apply
    monkeypatch.setattr(metric, "apply", lambda layer, keys: (columns.append(keys.shape[1]), apply(layer, keys))[1])
    a, b, c, d = (draw(400 + number, WIDTH, 2).float() for number in range(4))
    for keys, earlier, want in (
        (b, [a], [2, 2]),  # the history, and the batch
        (c, [a, b], [2]),  # the last batch is the history's new end
        (d, [a], [2]),  # b was reverted
        (d, [a, c], [2, 2]),
        (d, [c], [2, 2]),  # a was
        (d, [a.double(), c], [4, 2]),  # kept in another dtype: by no means the same bits
    ):
        columns.clear()
        assert agrees(metric.solve(LAYER, keys.double(), earlier), expected(n, keys, earlier))
        assert columns == want


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stale_is_used(name: str) -> None:
    of = moments()
    metric, n = metric_of(name, of)
    earlier, keys = [EDITS[0].clone(), EDITS[1].clone()], draw(500, WIDTH, 2)
    first = metric.solve(LAYER, keys, earlier)
    earlier[0][0, 0] += 1  # the caller's own tensor
    again = metric.solve(LAYER, keys, earlier)
    assert agrees(again, expected(n, keys, earlier)) and not agrees(again, first)
    of.by_layer[LAYER] = moments(1.1)[LAYER]  # moments that were replaced
    other, n = metric_of(name, of)
    assert agrees(other.solve(LAYER, keys, earlier), expected(n, keys, earlier))
    for number, name in enumerate(NAMES):  # metrics of the same moments
        other, n = metric_of(name, of)
        keys = draw(510 + number, WIDTH, 2)
        assert agrees(other.solve(LAYER, keys, earlier), expected(n, keys, earlier))


def test_a_stale_history_would_be_seen(monkeypatch) -> None:
    """The fault that the tests above are there for."""
    metric, n = metric_of("null space", moments())
    keys = draw(600, WIDTH, 2)
    metric.solve(LAYER, keys, [EDITS[0]])
    monkeypatch.setattr(deflation, "_same", lambda mine, given: mine.shape == given.shape)
    assert not agrees(metric.solve(LAYER, keys, [EDITS[3]]), expected(n, keys, [EDITS[3]]))


@pytest.mark.parametrize("where", ["apply", "folded"])
def test_an_interrupt_leaves_no_half_history(where: str, monkeypatch) -> None:
    metric, n = metric_of("with mu", moments())
    keys, short, long = draw(700, WIDTH, 2), EDITS[:2], [*EDITS, *EDITS]
    for now, then in ((short, long), (long, short), (long, EDITS[:3])):
        metric.solve(LAYER, keys, now)
        with monkeypatch.context() as patch:
            patch.setattr(metric, where, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            try:
                metric.solve(LAYER, keys, then)
            except KeyboardInterrupt:
                pass
        for earlier in (then, now):
            assert agrees(metric.solve(LAYER, keys, earlier), expected(n, keys, earlier))


def test_what_is_kept_is_bounded() -> None:
    of = moments()
    of.factors.limit = 2
    for weight in (1.0, 2.0, 3.0):
        Preserving(of, weight).solve(LAYER, draw(1, WIDTH, 1), [EDITS[0]])
    assert [name[1][1] for name in of.deflations] == [2.0, 3.0]
    solve_in_keys(Plain(), LAYER, draw(1, WIDTH, 1), [EDITS[0]])
    NullSpace(of, 0.6, 0.5).solve(LAYER, draw(1, WIDTH, 1), [])  # no sequence: nothing to keep
    assert len(of.deflations) == 2


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_are_not_finite(name: str) -> None:
    metric, _ = metric_of(name, moments())
    for earlier in ([], [EDITS[0]]):
        with pytest.raises(ValueError, match="keys of layer 3 are not finite"):
            metric.solve(LAYER, draw(1, WIDTH, 2) / 0 * 0, earlier)


@pytest.mark.parametrize("tolerance", [metric_file.TOLERANCE, -1.0])
def test_to_float64_accuracy(tolerance: float, monkeypatch) -> None:
    """C of condition 1e12: refined, and where that is not enough (never, at -1) from the factored sum."""
    monkeypatch.setattr(metric_file, "TOLERANCE", tolerance)
    scales, q = torch.logspace(-6, 0, WIDTH, dtype=torch.float64), torch.linalg.qr(draw(0, WIDTH, WIDTH)).Q
    c = (q * scales.square()) @ q.T
    of = ke.Moments.from_arrays({LAYER: ((c + c.T) / 2, 50)})
    metric, earlier = Preserving(of, 1.0), []
    for number in range(5):
        keys = draw(800 + number, WIDTH, 2).float()
        got = metric.solve(LAYER, keys.double(), earlier)
        a = torch.cat([*earlier, keys], 1).double()
        whole = of[LAYER].mean + a @ a.T
        residual = (whole @ got - keys).norm(dim=0)
        assert (residual <= 1e-13 * (torch.linalg.matrix_norm(whole, 2) * got.norm(dim=0) + keys.norm(dim=0))).all()
        earlier.append(keys)
