"""When a value is done, and PMET's two deltas: ENCORE's and PMET's loops beside plain ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.methods import encore, pmet
from knowedit_ext.editing.request import EditRequest
from knowedit_ext.editing.tokenized import tokenize_requests
from knowedit_ext.editing.values import Seen, optimise_values

from ..support.families import FAMILIES, tiny_model
from .models import editable
from .plain import down_projection, moments_of, plain_group_key, plain_key, plain_value
from .test_values import CONTEXTS, EASY, REQUESTS, TAUGHT, as_published, close

SIX = ["{}", *(f"w{n} w{n + 1}. {{}}" for n in range(11, 16))]
LONGER = [*TAUGHT, EditRequest("w17 {}", "w45 w46", "w12 w27")]
SLOW = replace(EASY, v_lr=0.3)  # certain before its loss is small


def encores(cutoff: float, target: tuple[int, ...], released: bool):
    """compute_z.py:165-203, with the counter where it stands there."""
    count = 0

    def rule(logp: torch.Tensor, kl: torch.Tensor) -> tuple[bool, float]:
        nonlocal count
        wanted = torch.tensor(target)
        if cutoff > 0:
            mean = logp.gather(-1, wanted.expand(len(logp), -1)[..., None])[..., 0].mean(1)
            return bool(mean.exp().mean() > cutoff), 1.0
        right = logp.argmax(-1) == wanted
        if right[1:].sum() == 5 if released else right.all():
            count += 1
            return count == -cutoff, 1.0
        return False, 1.0

    return rule


@pytest.mark.parametrize("cutoff", [-1.0, -3.0, 0.3])
@pytest.mark.parametrize("compat, contexts", [(None, CONTEXTS), (None, SIX), ("reference", SIX)])
def test_encore_stops(compat: str | None, contexts: list[str], cutoff: float) -> None:
    model = editable("qwen2")
    rule = encore.stop_rule(cutoff, compat)
    tokenized = tokenize_requests(model, LONGER, contexts, "subject_last")
    got = optimise_values(model, tokenized, SLOW, "mlp", 0, rule=rule)
    for number, request in enumerate(LONGER):
        target = tuple(model.tokenizer(request.target_new).input_ids)
        rule = encores(cutoff, target, compat == "reference")
        as_published(got, number, plain_value(model, request, contexts, SLOW, "mlp", 0, rule=rule))
    last = optimise_values(model, tokenized, SLOW, "mlp", 0)
    assert (got.steps < last.steps).any()  # the rule it was


def test_encores_rules_differ() -> None:
    """Three contexts: as released it never stops by its rule; the mended one does."""
    model = editable("qwen2")
    tokenized = tokenize_requests(model, TAUGHT, CONTEXTS, "subject_last")
    never, released, mended = (
        optimise_values(model, tokenized, SLOW, "mlp", 0, rule=rule).steps
        for rule in (None, encore.stop_rule(-1.0, "reference"), encore.stop_rule(-1.0, None))
    )
    assert torch.equal(never, released) and (mended < never).any()


@pytest.mark.parametrize("cutoff, message", [(-1.5, "a whole number of steps"), (1.0, "a number below 1")])
def test_cutoffs(cutoff: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"prob_cutoff is {cutoff}: expected .*{message}"):
        ke.ENCOREParams(layers=(1,), prob_cutoff=cutoff)


def test_what_is_seen() -> None:
    logp = torch.tensor([0.5, 0.5, 0.2, 0.8, 0.1]).log()
    owner, context = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 1, 1, 0])
    seen = Seen([7, 9], owner, context, logp, torch.tensor([True, True, True, False, True]), torch.zeros(2))
    assert seen.certain().tolist() == [False, True]
    alone = Seen([7], owner[:4], context[:4], logp[:4], torch.ones(4, dtype=torch.bool), torch.zeros(1))
    assert float(alone.probability()) == pytest.approx((0.5 + 0.4) / 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_pmets_two_deltas(family: str) -> None:
    model = tiny_model(family)
    params = ke.PMETParams(layers=(1,), v_num_grad_steps=6, clamp_norm_factor=2.0)
    tokenized = tokenize_requests(model, REQUESTS, CONTEXTS, "subject_last")
    got = optimise_values(model, tokenized, params, "mlp", 1, beside=("attn",))
    for number, request in enumerate(REQUESTS):
        as_published(got, number, plain_value(model, request, CONTEXTS, params, "mlp", 1, "attn"))


@pytest.mark.parametrize("kl_factor", [0.0, 0.3])
def test_pmet_weighs_and_stops(kl_factor: float) -> None:
    """compute_zs.py:150-190: a tenth of the target's loss once it is the most probable; done where KL is small too."""
    model, params = editable("qwen2"), replace(SLOW, kl_factor=kl_factor)
    tokenized = tokenize_requests(model, TAUGHT, CONTEXTS, "subject_last")
    got = optimise_values(model, tokenized, params, "mlp", 1, beside=("attn",), rule=pmet.stop_rule)
    lighter = 0
    for number, request in enumerate(TAUGHT):
        (target,) = model.tokenizer(request.target_new).input_ids

        def rule(logp: torch.Tensor, kl: torch.Tensor, target: int = target) -> tuple[bool, float]:
            nonlocal lighter
            most, own = logp.max(-1).values.exp().mean(), logp[..., target].exp().mean()
            lighter += most == own
            return bool(most == own and kl <= 0.01), 0.1 if most == own else 1.0

        want = plain_value(model, request, CONTEXTS, params, "mlp", 1, "attn", rule)
        close(got.values[number], want.value, 1e-3)
        assert got.steps[number] == len(want.losses) - 1
    assert lighter > 0


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmo2"])
def test_pmet_spreads_what_the_projection_puts_out(family: str) -> None:
    """The residual is of the down projection's output, over the root of the layers left; in post-norm layers too."""
    model, groups, layers = editable(family), [CONTEXTS[:1], CONTEXTS[1:]], (1, 2)
    moments = moments_of(model, layers)
    values = torch.randn(2, model.hidden_size, generator=torch.Generator().manual_seed(2))
    params = ke.PMETParams(layers=layers, mom2_update_weight=5.0)
    edit = ke.pmet(model, REQUESTS[:2], params, moments, contexts=groups, values=values)
    applied = []
    for number, (layer, name) in enumerate(zip(layers, edit.changes, strict=True)):
        keys = torch.stack([plain_group_key(model, request, groups, layer) for request in REQUESTS[:2]], 1)
        now = torch.stack([plain_key(model, request, "{}", layers[-1])[1] for request in REQUESTS[:2]], 1).double()
        residual = (values.T.double() - now) / (len(layers) - number) ** 0.5
        known = 5.0 * moments[layer].mean.double() + keys @ keys.T
        want = residual @ torch.linalg.solve(known, keys).T
        want = want if weight_is_output_first(model) else want.T
        assert (edit.delta(name) - want).norm() <= 1e-4 * want.norm()
        part = ke.Edit({name: edit.changes[name]})
        part.apply(model)
        applied.append(part)
    for part in reversed(applied):
        part.revert(model)


def weight_is_output_first(model: ke.EditableModel) -> bool:
    return isinstance(down_projection(model, 0), torch.nn.Linear)


def test_pmet_refuses_what_it_does_not_do() -> None:
    model = editable("gpt2")
    with pytest.raises(ValueError, match="only the MLP's down projection is edited"):
        ke.PMETParams.from_dict(dict(layers=[1], rewrite_module_tmps=["h.{}.attn.c_proj", "h.{}.mlp.c_proj"]))
    params = ke.PMETParams(layers=(1,))
    with pytest.raises(ValueError, match="files of values hold MEMIT's"):
        ke.pmet(model, REQUESTS[:1], params, moments_of(model, (1,)), contexts=[["{}"]], values="kvs")
