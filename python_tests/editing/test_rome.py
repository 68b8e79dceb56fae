"""ROME against its definition, on every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.edit import Edit
from knowedit_ext.editing.methods.r_rome import RROMEParams, r_rome
from knowedit_ext.editing.methods.rome import ROMEParams, rome
from knowedit_ext.editing.metric import Plain, Preserving, unmoved
from knowedit_ext.editing.request import EditRequest
from knowedit_ext.editing.tokenized import tokenize_requests
from knowedit_ext.editing.values import optimise_values
from knowedit_ext.moments import solver

from ..support.families import FAMILIES, WIDTH
from ..support.unchanged import assert_unchanged, snapshot
from .models import editable, fresh, unlikely
from .plain import covariance, down_projection, moments_of, plain_key, plain_value, probability, weight_name

CONTEXTS = ["{}", "w11 w12. {}", "w13 w14 w15 w16. {}"]
PARAMS = ROMEParams(
    layers=(0,), v_num_grad_steps=60, v_lr=0.5, v_weight_decay=0.0, clamp_norm_factor=1000.0, kl_factor=0.0
)
BRIEF = replace(PARAMS, v_num_grad_steps=6, clamp_norm_factor=4.0, v_weight_decay=0.5, kl_factor=0.0625)
MIDDLE = EditRequest("w5 {} w9 w10", "w3 w7", "w20 w21")


def layer_of(family: str) -> int:
    """Where a fact fits: post-norm layers add little to the stream, the lowest one counts most."""
    return 0 if family in ("gemma2", "gemma3", "gemma3_text", "olmo2") else 1


def mean_over_contexts(
    model: ke.EditableModel, request: EditRequest, layer: int, contexts: list[str] = CONTEXTS
) -> list[torch.Tensor]:
    """Mean input and output of the down projection, in float64."""
    pairs = [plain_key(model, request, context, layer) for context in contexts]
    return [torch.stack(column).double().mean(0) for column in zip(*pairs, strict=True)]


def two_keys(model: ke.EditableModel, request: EditRequest, layer: int) -> torch.Tensor:
    """[d_in, 2]: the bare prompt's and the mean of the other contexts'."""
    return torch.stack([mean_over_contexts(model, request, layer, part)[0] for part in (CONTEXTS[:1], CONTEXTS[1:])], 1)


def least(moment: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """argmin u^T C u with u^T k = 1 for each column of keys: of the equations of the Lagrangian, of length 1."""
    d, n = keys.shape
    system = torch.zeros(d + n, d + n, dtype=torch.float64)
    system[:d, :d], system[:d, d:], system[d:, :d] = moment, keys, keys.T
    u = torch.linalg.solve(system, torch.cat([torch.zeros(d), torch.ones(n)]).double())[:d]
    return u / u.norm()


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fact_goes_in_and_comes_out(family: str) -> None:
    model, layer = editable(family), layer_of(family)
    before, moments = snapshot(model.hf), moments_of(model, [layer])
    request = unlikely(model, "w17 w18 {}", "w33")
    assert probability(model, request) < 0.1
    edit = rome(model, request, replace(PARAMS, layers=(layer,)), moments, contexts=CONTEXTS[:1])
    assert_unchanged(before, model.hf)
    with edit.applied(model):
        assert probability(model, request) > 0.9
        changed = [n for n, p in model.hf.named_parameters() if not torch.equal(p, before["parameters"][n][0])]
        assert changed == [weight_name(model, layer)] == list(edit.changes)
    assert_unchanged(before, model.hf)


@pytest.mark.parametrize("subject", ["w40", "w50 w51"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_subject_amid_the_prompt(family: str, subject: str) -> None:
    model = editable(family)
    request = unlikely(model, "w5 {} w9", subject)
    assert probability(model, request) < 0.1
    with rome(model, request, PARAMS, moments_of(model, [0], 2000), contexts=CONTEXTS[:1]).applied(model):
        assert probability(model, request) > 0.9


def test_several_target_tokens() -> None:
    model, request = editable("phi3"), EditRequest("w17 {}", "w45 w46", "w12 w13")
    assert probability(model, request) < 0.01
    with rome(model, request, PARAMS, moments_of(model, [0], 2000), contexts=CONTEXTS[:1]).applied(model):
        assert probability(model, request) > 0.8


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma2", "olmo2"])
def test_equal_to_the_published_rule(family: str, compat: str | None) -> None:
    model, layer = editable(family), 1
    params = replace(BRIEF, layers=(layer,))
    edit = rome(model, MIDDLE, params, moments_of(model, [layer]), contexts=CONTEXTS, compat=compat)
    published = mean_over_contexts(model, MIDDLE, layer)[0][:, None]
    keys = two_keys(model, MIDDLE, layer) if compat is None else published
    u = least(covariance(model, [layer])[layer], keys)
    target = plain_value(model, MIDDLE, CONTEXTS, params, "mlp", layer).value.double()
    key, value = (x.double() for x in plain_key(model, MIDDLE, "{}", layer))
    v = (target - value) / (key @ u)
    want = torch.outer(v, u)  # [d_out, d_in]
    linear = isinstance(down_projection(model, layer), torch.nn.Linear)
    close(edit.delta(weight_name(model, layer)), want if linear else want.T, 2e-4)


def value_of(model: ke.EditableModel, params: ROMEParams, layer: int) -> torch.Tensor:
    tokenized = tokenize_requests(model, [MIDDLE], CONTEXTS, "subject_last")
    return optimise_values(model, tokenized, params, "mlp", layer).values[0].double()


@pytest.mark.parametrize("compat", [None, "reference"])
def test_the_bare_prompt_gets_the_value(compat: str | None) -> None:
    model = editable("gpt2")
    target = value_of(model, BRIEF, 0)
    with rome(model, MIDDLE, BRIEF, moments_of(model, [0]), contexts=CONTEXTS, compat=compat).applied(model):
        close(plain_key(model, MIDDLE, "{}", 0)[1].double(), target, 1e-5)


def test_one_key_for_both() -> None:
    """R-ROME: on average over the contexts, and not at the bare prompt."""
    model, params = editable("gpt2"), RROMEParams.from_dict(BRIEF.to_dict())
    target = value_of(model, BRIEF, 0)
    for compat in (None, "reference"):
        edit = r_rome(model, MIDDLE, params, moments_of(model, [0]), contexts=CONTEXTS, compat=compat)
        with edit.applied(model):
            close(mean_over_contexts(model, MIDDLE, 0)[1], target, 1e-5)
            assert (plain_key(model, MIDDLE, "{}", 0)[1].double() - target).norm() > 1e-2 * target.norm()


def test_a_bare_prompt_unlike_its_contexts() -> None:
    """Keys orthogonal in C^-1, as where the subject begins a text: with the bare prompt one of 21 contexts the others
    get 20 times the change; by default exactly as much as the bare prompt."""
    model = fresh("llama")
    contexts = ["{}", *(f"w1{n % 10} w2. {{}}" for n in range(20))]
    pairs = [plain_key(model, MIDDLE, context, 1)[0].double() for context in contexts]
    bare, others = pairs[0], torch.stack(pairs[1:]).mean(0)
    # C with which the two means are orthogonal, each of length 1
    basis = torch.stack([bare, others], 1)
    dual = basis @ torch.linalg.inv(basis.T @ basis)
    inverse = dual @ dual.T + 1e-6 * torch.eye(len(bare), dtype=torch.float64)
    moments = ke.Moments.from_arrays({1: (torch.linalg.inv(inverse), 1000)})
    shares = {}
    for compat in (None, "reference"):
        edit = rome(model, MIDDLE, replace(BRIEF, layers=(1,)), moments, contexts=contexts, compat=compat)
        u = direction(edit).double()
        shares[compat] = float(others @ u / (bare @ u))
    assert shares[None] == pytest.approx(1, rel=1e-4) and shares["reference"] == pytest.approx(20, rel=0.05)


def test_earlier_keys_and_both_of_its_own() -> None:
    """What two earlier edits wrote stays, and the bare prompt still gets as much as the other contexts."""
    model = editable("llama")
    moments, params = moments_of(model, [1], 2000), replace(BRIEF, layers=(1,))
    others = [replace(MIDDLE, subject=subject) for subject in ("w21 w22", "w23")]
    earlier = [rome(model, each, params, moments, contexts=CONTEXTS) for each in others]
    edit = rome(model, MIDDLE, params, moments, contexts=CONTEXTS, earlier=earlier)
    u, mine = direction(edit).double(), two_keys(model, MIDDLE, 1)
    held = torch.cat([each.keys[1] for each in earlier], 1).double()
    size = float(mine[:, 0] @ u)
    assert float(mine[:, 1] @ u) == pytest.approx(size, rel=1e-4)
    assert float((held.T @ u).abs().max()) < 1e-4 * abs(size)
    # of all that does this it is the cheapest
    constraints = torch.cat([mine, held], 1)
    moment = covariance(model, [1], 2000)[1]
    system = torch.linalg.solve(moment, constraints)
    want = system @ torch.linalg.solve(constraints.T @ system, torch.tensor([1.0, 1, 0, 0]).double())
    close(u, want / want.norm())


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("earlier", ["reference", "r-rome", "memit", "bare"])
def test_a_fact_that_an_earlier_edit_has_is_refused(earlier: str, compat: str | None) -> None:
    """Its keys are another mean of the same contexts, or the bare prompt's: what they leave of k* must not move."""
    model = editable("llama")
    moments, params = moments_of(model, [1], 2000), replace(BRIEF, layers=(1,))
    if earlier == "memit":
        given = ke.MEMITParams.from_dict(params.to_dict())
        old = ke.memit(model, [MIDDLE], given, moments, contexts=[CONTEXTS])
    elif earlier == "r-rome":
        old = r_rome(model, MIDDLE, RROMEParams.from_dict(params.to_dict()), moments, contexts=CONTEXTS)
    else:
        contexts = CONTEXTS[:1] if earlier == "bare" else CONTEXTS
        old = rome(model, MIDDLE, params, moments, contexts=contexts, compat="reference")
    with pytest.raises(ValueError, match=r"cannot be told apart|would get nothing.*\. Leave out the earlier edit"):
        rome(model, MIDDLE, params, moments, contexts=CONTEXTS, compat=compat, earlier=[old])


def test_keys_along_one_line() -> None:
    """Nothing but their length tells them apart: u is that of k*."""
    key = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)).double()
    for other in (0.5, 0.5 + 1e-9, 2.0):
        mean = (key + other * key) / 2
        assert torch.equal(unmoved(Plain(), 0, mean, mean, key - mean, ()), mean)


def test_keys_that_differ_by_rounding_are_one() -> None:
    """GPT-J's layer 0 reads the token alone: a context changes its key by rounding, and u nothing."""
    model = editable("gptj")
    moments = moments_of(model, [0])
    one, many = (
        rome(model, MIDDLE, BRIEF, moments, contexts=contexts, ridge=1e-3) for contexts in (CONTEXTS[:1], CONTEXTS)
    )
    close(direction(many), direction(one), 1e-5)


def test_several_layers_one_after_the_other() -> None:
    model = editable("gpt2")
    moments, before = moments_of(model, [0, 2]), snapshot(model.hf)
    both = rome(model, MIDDLE, replace(BRIEF, layers=(0, 2)), moments, contexts=CONTEXTS)
    assert_unchanged(before, model.hf)
    first = rome(model, MIDDLE, replace(BRIEF, layers=(0,)), moments, contexts=CONTEXTS)
    with first.applied(model):
        second = rome(model, MIDDLE, replace(BRIEF, layers=(2,)), moments, contexts=CONTEXTS)
    assert list(both.changes) == [*first.changes, *second.changes]
    for part in (first, second):
        [name] = part.changes
        assert torch.equal(both.delta(name), part.delta(name))


@pytest.mark.parametrize(
    "family, size",
    [("gpt2", "n_inner"), ("gptj", "n_inner"), ("llama", "intermediate_size"), ("phi3", "intermediate_size")],
)
def test_square_weights_go_by_module_type(family: str, size: str | None) -> None:
    model, layer = fresh(family, **{size: WIDTH}), 1
    assert down_projection(model, layer).weight.shape == (WIDTH, WIDTH)
    params, moments = replace(BRIEF, layers=(layer,)), moments_of(model, [layer])
    target = value_of(model, params, layer)
    with rome(model, MIDDLE, params, moments, contexts=CONTEXTS).applied(model):
        close(plain_key(model, MIDDLE, "{}", layer)[1].double(), target, 1e-5)
    request = unlikely(model, "w17 w18 {}", "w33")
    with rome(model, request, replace(PARAMS, layers=(layer,)), moments, contexts=CONTEXTS[:1]).applied(model):
        assert probability(model, request) > 0.9


def direction(edit: Edit) -> torch.Tensor:
    [change] = edit.changes.values()
    return change.inputs[:, 0]


def test_without_moments_the_direction_is_the_key() -> None:
    model = editable("llama")
    params = replace(BRIEF, mom2_adjustment=False)
    keys = two_keys(model, MIDDLE, 0)
    edit = rome(model, MIDDLE, params, contexts=CONTEXTS)
    close(direction(edit), least(torch.eye(len(keys), dtype=torch.float64), keys))
    with_moments = rome(model, MIDDLE, BRIEF, moments_of(model, [0]), contexts=CONTEXTS)
    assert (direction(with_moments) - direction(edit)).norm() > 1e-2
    with pytest.raises(ValueError, match="moments are needed"):
        rome(model, MIDDLE, BRIEF, contexts=CONTEXTS)


def test_left_as_found_after_an_exception() -> None:
    model = fresh("gpt2")
    moments, weight = moments_of(model, [0, 2]), down_projection(model, 0).weight
    original = weight.detach().clone()

    def fail(module: torch.nn.Module, args: tuple) -> None:  # once the first layer is edited
        if not torch.equal(weight, original):
            raise RuntimeError("broken on purpose")

    model.modules.layers[3].register_forward_pre_hook(fail)
    before = snapshot(model.hf)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        rome(model, MIDDLE, replace(BRIEF, layers=(0, 2)), moments, contexts=CONTEXTS)
    assert_unchanged(before, model.hf)
    assert not model.__dict__.get("applied_edits")


def test_what_it_was_made_from_is_kept() -> None:
    model = editable("gpt2")
    edit = rome(model, MIDDLE, BRIEF, moments_of(model, [0]), contexts=CONTEXTS, compat="reference")
    assert edit.method == "rome" and edit.compat == "reference" and edit.contexts == CONTEXTS
    assert [EditRequest.of(request) for request in edit.requests] == [MIDDLE]
    assert ROMEParams.from_dict(edit.params) == BRIEF
    assert edit.model["type"] == "gpt2" and edit.model["layers"] == model.num_layers


def test_directions_of_many_keys_are_those_of_each() -> None:
    """(C + k k^T)^-1 k, a key at a time, has the direction of its column of C^-1 K."""
    generator = torch.Generator().manual_seed(0)
    x, keys = (torch.randn(n, 24, generator=generator, dtype=torch.float64) for n in (60, 5))
    moment = x.T @ x / 60
    metric = Preserving(ke.Moments.from_arrays({1: (moment, 60)}), 1.0)
    together = metric.alone(1, keys.T)
    for n, key in enumerate(keys):
        plain = torch.linalg.solve(moment + torch.outer(key, key), key)
        torch.testing.assert_close(together[:, n] / together[:, n].norm(), plain / plain.norm(), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="keys of layer 1 are not finite"):
        metric.alone(1, keys.T * float("nan"))


def test_the_condition_is_estimated_where_a_message_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would bring a factor of 2 GB to the host for every layer."""
    asked, real = [], solver.condition_estimate
    monkeypatch.setattr(solver, "condition_estimate", lambda *given: asked.append(1) or real(*given))
    moments = ke.Moments.from_arrays({1: (torch.diag(torch.tensor([1.0, 100.0, 10.0])), 60)})
    moments.solve(1, torch.ones(3, 1), 1.0)
    factor = moments.factors.get(moments[1], 1.0, None, False, torch.device("cpu"))
    assert not asked and factor.condition == pytest.approx(100) and len(asked) == 1
