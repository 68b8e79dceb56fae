"""AlphaEdit and EMMET beside a plain float64 reading of the published solves; the history of edits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.metric import NullSpace, Plain, Preserving, solve_in_keys

from ..support.families import FAMILIES, WIDTH
from ..support.unchanged import assert_unchanged, snapshot
from .models import editable, fresh
from .plain import covariance, down_projection, moments_of, plain_memit
from .test_memit import GROUPS, LAYERS, REQUESTS

SPREADING = [family for family in FAMILIES if family not in ("gemma2", "gemma3", "gemma3_text", "olmo2")]
COMMON = dict(layers=LAYERS, v_num_grad_steps=3, clamp_norm_factor=3.0)
ALPHA = ke.AlphaEditParams(**COMMON, nullspace_share=0.2, L2=0.5)
EMMET = ke.EMMETParams(**COMMON, mom2_update_weight=40.0, update_norm_lambda=0.3)


def targets(count: int) -> torch.Tensor:
    return 3 * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0))


def published_alphaedit(covariances: dict[int, torch.Tensor], params: ke.AlphaEditParams):
    """AlphaEdit_main.py:107-151 in float64: the projection from an SVD, then the unsymmetric d x d system."""

    def solve(layer: int, keys: torch.Tensor) -> torch.Tensor:
        u, s, _ = torch.linalg.svd(covariances[layer].double())
        small = s.flip(0).cumsum(0).flip(0) <= params.nullspace_share * s.sum()  # of the sum of the smaller ones
        projection = u[:, small] @ u[:, small].T
        left = projection @ keys @ keys.T + params.L2 * torch.eye(len(keys), dtype=torch.float64)
        return torch.linalg.solve(left, projection @ keys)

    return solve


@pytest.mark.parametrize("family", SPREADING)
def test_alphaedit_equals_the_published_system(family: str) -> None:
    model = editable(family)
    moments, matrices, values = moments_of(model, LAYERS), covariance(model, LAYERS), targets(len(REQUESTS))
    edit = ke.alphaedit(model, REQUESTS, ALPHA, moments, contexts=GROUPS, values=values)
    solve = published_alphaedit(matrices, ALPHA)
    want = plain_memit(model, REQUESTS, LAYERS, 1.0, matrices, GROUPS, values, solve=solve)
    for layer, (name, change) in zip(LAYERS, want.items(), strict=True):
        assert (edit.delta(name) - change).norm() <= 1e-4 * change.norm()
        inputs = edit.changes[name].inputs
        outside = inputs - moments.null_space(layer, share=0.2).project(inputs)
        assert outside.norm() <= 1e-9 * inputs.norm()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_emmet_equals_the_published_solve(family: str, count: int) -> None:
    """Its closed form with explicit inverses; of one request the value is met."""
    model, layers = editable(family), (1,)
    moments, matrices, values = moments_of(model, layers), covariance(model, layers), targets(count)
    params, requests = replace(EMMET, layers=layers), REQUESTS[:count]

    def solve(layer: int, keys: torch.Tensor) -> torch.Tensor:
        metric = params.mom2_update_weight * matrices[layer].double()
        metric += params.update_norm_lambda * torch.eye(len(metric), dtype=torch.float64)
        cheap = metric.inverse() @ keys
        d = keys.T @ cheap + (0 if count == 1 else params.emmet_lambda) * torch.eye(count, dtype=torch.float64)
        return cheap @ d.inverse()

    edit = ke.emmet(model, requests, params, moments, contexts=GROUPS, values=values)
    want = plain_memit(model, requests, layers, 1.0, matrices, GROUPS, values, solve=solve)
    for name, change in want.items():
        assert (edit.delta(name) - change).norm() <= 1e-4 * change.norm()
    if count == 1:
        change = next(iter(edit.changes.values()))
        assert float(change.inputs.T @ edit.keys[1].double()) == pytest.approx(1, abs=1e-5)


def test_emmet_of_many_is_memit_with_its_weights_multiplied() -> None:
    model = editable("llama")
    moments, values = moments_of(model, LAYERS), targets(len(REQUESTS))
    memit = ke.MEMITParams(**COMMON, mom2_update_weight=4.0, update_norm_lambda=0.03)
    one = ke.emmet(model, REQUESTS, EMMET, moments, contexts=GROUPS, values=values)
    other = ke.memit(model, REQUESTS, memit, moments, contexts=GROUPS, values=values)
    for name in one.changes:
        assert (one.delta(name) - other.delta(name)).norm() <= 1e-9 * one.delta(name).norm()


@pytest.mark.parametrize("earlier", [0, 4])
def test_metrics_are_one_formula(earlier: int) -> None:
    """S against (eps N^-1 + A A^T)^-1 A, with explicit inverses."""
    width, generator = 12, torch.Generator().manual_seed(1)
    scales = torch.logspace(-2, 1, width, dtype=torch.float64)
    sample = torch.randn(90, width, generator=generator, dtype=torch.float64) * scales
    c = sample.T @ sample / len(sample)
    moments = ke.Moments.from_arrays({3: (c, len(sample))})
    keys, before = (torch.randn(width, n, generator=generator, dtype=torch.float64) for n in (3, earlier))
    together, history = torch.cat([before, keys], 1), [before] if earlier else []
    eye = torch.eye(width, dtype=torch.float64)
    for metric, inverse in (
        (Preserving(moments, 7.0), 7 * c),
        (Preserving(moments, 7.0, mu=0.4), 7 * c + 0.4 * eye),
        (Plain(0.3), 0.3 * eye),
    ):
        want = torch.linalg.solve(inverse + together @ together.T, together)[:, earlier:]
        assert torch.allclose(metric.solve(3, keys, history), want, rtol=1e-9, atol=1e-12)
        assert torch.allclose(solve_in_keys(metric, 3, keys, history), want, rtol=1e-6, atol=1e-9)
    values, vectors = torch.linalg.eigh(c)
    low = vectors[:, values < 0.5]
    projection = low @ low.T
    want = (
        projection
        @ together
        @ torch.linalg.inv(0.6 * torch.eye(together.shape[1], dtype=torch.float64) + together.T @ projection @ together)
    )
    got = NullSpace(moments, 0.6, threshold=0.5).solve(3, keys, history)
    assert torch.allclose(got, want[:, earlier:], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("threshold", [1e-3, 0.05, 30.0])
def test_null_space(threshold: float, tmp_path) -> None:
    model = editable("gpt2")
    moments_of(model, [1]).save(tmp_path)
    moments = ke.Moments.load(tmp_path)
    values, vectors = torch.linalg.eigh(moments[1].mean.double())
    rank = int((values < threshold).sum())
    if not 0 < rank < len(values):
        with pytest.raises(ValueError, match="direction is in the null space .* eigenvalues go from"):
            moments.null_space(1, threshold)
        return
    space = moments.null_space(1, threshold)
    assert space.rank == rank and space.vectors.shape[1] == min(rank, len(values) - rank)
    x = torch.randn(len(values), 4, dtype=torch.float64)
    low = vectors[:, :rank]
    assert torch.allclose(space.project(x), low @ (low.T @ x), atol=1e-10)
    (file,) = tmp_path.glob("null_space_1_*.safetensors")
    before = file.read_bytes()
    again = ke.Moments.load(tmp_path).null_space(1, threshold)
    assert torch.equal(again.vectors, space.vectors) and again.rank == rank and file.read_bytes() == before
    other = ke.Moments.from_arrays({1: (2 * moments[1].mean, 5)})
    other.folder = tmp_path  # moments that were replaced: what is kept is not theirs
    if low := int((2 * values < threshold).sum()):
        assert other.null_space(1, threshold).rank == low
    else:
        with pytest.raises(ValueError, match="no direction"):
            other.null_space(1, threshold)


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "give one"),
        (dict(threshold=0.1, share=0.1), "give one"),
        (dict(threshold=-1.0), "threshold is -1.0"),
        (dict(threshold=float("nan")), "threshold is nan"),
        (dict(share=1.5), "share is 1.5"),
    ],
)
def test_no_null_space(given, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moments_of(editable("gpt2"), [1]).null_space(1, **given)


@pytest.mark.parametrize("method, params", [(ke.alphaedit, ALPHA), (ke.emmet, EMMET)])
def test_earlier_keys_are_left_alone(method, params, tmp_path) -> None:
    """What an earlier edit wrote moves less with its keys in the system; a file keeps them, a merge joins them."""
    model = fresh("llama")
    params = replace(params, layers=(1,))
    moments, values = moments_of(model, [1]), targets(len(REQUESTS))
    first, rest = REQUESTS[:1], REQUESTS[1:]
    made = method(model, first, params, moments, contexts=GROUPS, values=values[:1])
    made.save(tmp_path / "first.safetensors")
    earlier = ke.Edit.load(tmp_path / "first.safetensors")
    assert torch.equal(earlier.keys[1], made.keys[1])
    moved = []
    with made.applied(model):
        for history in ([], [earlier]):
            later = method(model, rest, params, moments, contexts=GROUPS, values=values[1:], earlier=history)
            change = next(iter(later.changes.values()))
            moved.append(float((change.outputs @ (change.inputs.T @ made.keys[1].double())).norm()))
            assert later.keys[1].shape == (moments[1].width, len(rest))
    assert moved[1] < 0.7 * moved[0]
    joined = ke.Edit.merge([earlier, later])
    assert torch.equal(joined.keys[1], torch.cat([earlier.keys[1], later.keys[1]], 1))


def test_history_that_does_not_fit() -> None:
    model = fresh("gpt2")
    before, moments = snapshot(model.hf), moments_of(model, LAYERS)
    good = ke.memit(model, REQUESTS[:1], ke.MEMITParams(**COMMON), moments, contexts=GROUPS, values=targets(1))

    def changed(**keys: torch.Tensor) -> ke.Edit:
        edit = ke.Edit(good.changes, "memit", good.requests)
        edit.keys = {int(name.removeprefix("layer")): x for name, x in keys.items()}
        return edit

    width = down_projection(model, 0).weight.shape[0]
    cases = [
        (ke.Edit(good.changes, "ft"), r"earlier\[1\] \(ft of 0 requests\) has no keys of layer 0: it keeps none"),
        (changed(layer0=good.keys[0]), r"no keys of layer 1: it has those of 0"),
        (changed(layer0=good.keys[0][:3], layer1=good.keys[1]), rf"keys \[3, 1\] at layer 0: not \[{width}, n\]"),
        (changed(layer0=good.keys[0] / 0, layer1=good.keys[1]), "at layer 0 that are not finite"),
    ]
    for edit, message in cases:
        with pytest.raises(ValueError, match=message):
            ke.alphaedit(model, REQUESTS[1:], ALPHA, moments, contexts=GROUPS, earlier=[good, edit])
    with pytest.raises(TypeError, match=r"earlier\[0\] is a dict"):
        ke.emmet(model, REQUESTS[1:], EMMET, moments, contexts=GROUPS, earlier=[{}])
    assert_unchanged(before, model.hf)


@pytest.mark.parametrize("adjustment", [True, False])
@pytest.mark.parametrize("method, compat", [(ke.rome, None), (ke.rome, "reference"), (ke.r_rome, None)])
def test_rome_leaves_earlier_keys_exactly(method, compat: str | None, adjustment: bool) -> None:
    """S = N A (A^T N A)^-1: the new key comes out as wanted, earlier ones as they were. By default ROME has two new
    ones, see test_rome.py."""
    model, requests = fresh("llama"), [ke.EditRequest("w5 {} w9", f"w{n}", "w20") for n in (3, 7, 33)]
    kind = ke.ROMEParams if method is ke.rome else ke.RROMEParams
    params = kind(layers=(1,), v_num_grad_steps=4, mom2_adjustment=adjustment, update_norm_lambda=0.01)
    moments, contexts = moments_of(model, [1]), ["{}", "w11 w12. {}"]
    earlier = []
    for request in requests:
        edit = method(model, request, params, moments, contexts=contexts, earlier=earlier, compat=compat)
        (change,) = edit.changes.values()
        moved = lambda other, change=change: (change.outputs @ (change.inputs.T @ other.keys[1].double())).norm()  # noqa: E731
        for other in earlier:
            assert moved(other) <= 1e-5 * moved(edit)
        edit.apply(model)
        earlier.append(edit)
    together = torch.cat([edit.keys[1] for edit in earlier], 1).double()
    metric = moments[1].mean.double() + 0.01 * torch.eye(len(together)) if adjustment else torch.eye(len(together))
    cheap = torch.linalg.solve(metric.double(), together)
    want = (cheap @ torch.linalg.inv(together.T @ cheap))[:, -1]
    if (method, compat) != (ke.rome, None):
        assert torch.allclose(change.inputs[:, 0].double(), want / want.norm(), atol=1e-5)
    with pytest.raises(ValueError, match="cannot be told apart.*Leave out the earlier edit that is redone"):
        method(model, requests[0], params, moments, contexts=contexts, earlier=earlier)


def test_mu_is_no_parameter_of_alphaedit() -> None:
    with pytest.raises(ValueError, match="update_norm_lambda is 1.0: in the null space L2 is that"):
        replace(ALPHA, update_norm_lambda=1.0)
