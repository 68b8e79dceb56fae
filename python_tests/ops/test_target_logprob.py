"""`target_logprob`: tiles against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from ops import oracle, trees

from knowedit_ext import ops
from knowedit_ext.ops import logprob, reference


def problem(rows: int, d: int, vocab: int, k: int | None, dtype=torch.float32, device="cpu", bias=True):
    torch.manual_seed(rows * d + vocab)
    hidden, weight, shift = torch.randn(rows, d), torch.randn(vocab, d) / d**0.5, torch.randn(vocab)
    targets = torch.randint(0, vocab, (rows,) if k is None else (rows, k))
    return (
        hidden.to(dtype).to(device),
        weight.to(dtype).to(device),
        shift.to(dtype).to(device) if bias else None,
        targets.to(device),
    )


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    if request.param == "many tiles":
        monkeypatch.setattr(logprob, "_TILE", 1)  # the least width, 256 tokens
        monkeypatch.setattr(logprob, "_CPU_WIDTH", 48)
        monkeypatch.setattr(logprob, "_ROWS", 5)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, d, vocab, k", [(1, 1, 1, None), (7, 8, 257, None), (12, 40, 1000, 3), (129, 64, 513, 1)]
)
def test_matches_oracle(device, tiles, rows, d, vocab, k, dtype, softcap):
    for bias in (True, False):
        args = problem(rows, d, vocab, k, dtype, device, bias)
        out = ops.target_logprob(*args, softcap)
        assert out.shape == args[3].shape
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        truth = oracle.target_logprob(*args, softcap)
        trees.assert_as_good_as(out, reference.target_logprob(*args, softcap), truth)


def test_large_logits_do_not_overflow(device, tiles):
    hidden, weight, bias, targets = problem(6, 8, 600, None, device=device)
    out = ops.target_logprob(hidden * 1000, weight, bias, targets)
    assert trees.error(out, oracle.target_logprob(hidden * 1000, weight, bias, targets, 0.0)) < 1e-5


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("k", [None, 2])
def test_gradients(device, tiles, softcap, k):
    hidden, weight, bias, targets = problem(6, 2, 300, k, torch.float64, device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: ops.target_logprob(h, w, b, targets, softcap), leaves, fast_mode=True
    )


def test_gradient_of_hidden_alone(device):
    hidden, weight, _, targets = problem(6, 8, 300, None, torch.bfloat16, device)
    ops.target_logprob(hidden.requires_grad_(), weight, None, targets).sum().backward()
    assert hidden.grad.dtype == torch.bfloat16 and hidden.grad.isfinite().all()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("bias", [True, False])
def test_log_sum_exp_and_its_gradient(device, tiles, softcap, bias):
    hidden, weight, shift, _ = problem(7, 3, 700, None, torch.float64, device, bias)
    if bias:
        shift[:300] = float("-inf")  # the whole first tile: tokens that are never said
    leaf = (1000 * hidden).requires_grad_()
    plain = (1000 * hidden).requires_grad_()
    logits = torch.nn.functional.linear(plain, weight, shift)
    want = (softcap * torch.tanh(logits / softcap) if softcap else logits).logsumexp(1)
    up = torch.randn(7, dtype=torch.float64, device=device)
    got = logprob.log_sum_exp(leaf, weight, shift, softcap)
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(got, leaf, up)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, plain, up)[0])
    small = hidden.clone().requires_grad_()
    finite = None if shift is None else shift.nan_to_num(neginf=0.0)
    assert torch.autograd.gradcheck(lambda h: logprob.log_sum_exp(h, weight, finite, softcap), small)


def test_opcheck(device):
    hidden, weight, bias, targets = problem(5, 8, 300, 2, device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    torch.library.opcheck(torch.ops.knowedit_ext.target_logprob.default, (*leaves, targets, 1.0))


def test_two_runs_are_equal_and_no_rows_are_fine(device):
    args = problem(20, 16, 700, None, device=device)
    assert torch.equal(ops.target_logprob(*args), ops.target_logprob(*args))
    assert ops.target_logprob(args[0][:0], *args[1:3], args[3][:0]).shape == (0,)


def test_bad_arguments():
    hidden, weight, bias, targets = problem(4, 8, 30, None)
    with pytest.raises(IndexError, match="target 30 is outside the vocabulary of 30"):
        ops.target_logprob(hidden, weight, bias, targets.fill_(30))
    with pytest.raises(ValueError, match=r"head_weight must be \[vocab, 8\]"):
        ops.target_logprob(hidden, weight.T, bias, targets)
    with pytest.raises(ValueError, match=r"head_bias must be \[30\]"):
        ops.target_logprob(hidden, weight, bias[1:], targets)
    with pytest.raises(ValueError, match="targets must be int64"):
        ops.target_logprob(hidden, weight, bias, targets[1:])
    with pytest.raises(ValueError, match="head_weight is torch.float16"):
        ops.target_logprob(hidden, weight.half(), bias, targets)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("k", [None, 3])
def test_learned_through(device, tiles, k, softcap):
    """Where gradients go to the hidden states alone: values and gradients of the op's in float64."""
    for bias in (True, False):
        for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
            hidden, weight, shift, targets = problem(9, 6, 300, k, dtype, device, bias)
            hidden, weight, shift = (None if t is None else t.double() for t in (hidden, weight, shift))
            up = torch.randn(targets.shape, dtype=torch.float64, device=device)
            truth = ops.target_logprob(hidden.requires_grad_(), weight, shift, targets, softcap)
            (want,) = torch.autograd.grad((truth * up).sum(), hidden)
            x, w, b = (None if t is None else t.detach().to(dtype) for t in (hidden, weight, shift))
            out = logprob.Learned.apply(x.requires_grad_(), w, b, targets, softcap)
            (got,) = torch.autograd.grad((out * up.to(out.dtype)).sum(), x)
            assert out.shape == targets.shape and out.dtype == reference.compute_dtype(dtype) and got.dtype == dtype
            assert float((out - truth).detach().abs().max()) < 10 * min(close, 1e-5)
            assert float((got - want).abs().max()) < 10 * close
    assert logprob.Learned.apply(x[:0], w, b, targets[:0], softcap).shape == targets[:0].shape


def wide_product(a: torch.Tensor, b: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
    """What a GPU makes of 16-bit factors: they are multiplied as they are, sums and result are float32."""
    out = a.to(b.dtype).float() @ b.float()
    return out if plus is None else out + plus


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("learned", [True, False])
def test_gradients_of_16_bit_products(tiles, monkeypatch, dtype, softcap, learned):
    """As on a GPU, where the factors stay as they are: as good as torch's own expression in that dtype."""
    monkeypatch.setattr(logprob, "_multiplied_as", lambda hidden: hidden.dtype)
    monkeypatch.setattr(logprob, "_product", wide_product)
    args = problem(9, 24, 700, 2, dtype)
    targets, up = args[3], torch.randn(9, 2)
    function = logprob.Learned.apply if learned else ops.target_logprob

    def gradients(call, kind):
        leaves = [x.to(kind).detach().requires_grad_() for x in args[:3]]
        out = call(*leaves)
        return out.detach(), torch.autograd.grad((out * up.to(out.dtype)).sum(), leaves[:1] if learned else leaves)

    def plain(hidden, weight, bias):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        return logits.log_softmax(-1).gather(1, targets)

    truth, want = gradients(plain, torch.float64)
    _, theirs = gradients(plain, dtype)
    out, ours = gradients(lambda h, w, b: function(h, w, b, targets, softcap), dtype)
    assert out.dtype == torch.float32 and trees.error(out, truth) < 1e-5
    for got, other, exact in zip(ours, theirs, want, strict=True):
        assert got.dtype == dtype
        trees.assert_as_good_as(got, other, exact)
