"""Requests that ask for less of a target, or under a noised subject: against hook loops; and the five problems."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.methods import METHODS
from knowedit_ext.editing.problems import PROBLEMS, problem_record
from knowedit_ext.editing.request import check_requests
from knowedit_ext.editing.tokenized import tokenize_requests
from knowedit_ext.editing.values import optimise_values

from ..support.families import FAMILIES, LAYERS, tiny_model
from .models import editable, unlikely
from .plain import hooked, moments_of, noised, plain_noise, plain_value, spell
from .test_methods import RECORDS, brief
from .test_values import CONTEXTS, PARAMS, close

NOISE = ke.SubjectNoise(0.3, samples=2)
MIXED = [
    ke.EditRequest("w5 {} w9 w10", "w3 w7", "w20"),
    ke.EditRequest("{} w9 w10 w12 w21", "w33", "w22 w23 w24", minimise=True),
    ke.EditRequest("w6 w8 w15 {} w41", "w30 w31 w32", "w25 w26", noise=NOISE),
    ke.EditRequest("w17 w18 {}", "w45 w46", "w27", minimise=True, noise=ke.SubjectNoise(0.1, samples=3, seed=5)),
    ke.EditRequest("w17 {}", "w45", "w12", "w12"),
]


def in_double(family: str) -> ke.EditableModel:
    import copy

    model = tiny_model(family)
    return ke.load_model((copy.deepcopy(model.hf).double(), model.tokenizer))


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["mlp", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_mixed_directions_equals_the_loop(family: str, site: str) -> None:
    model = in_double(family)
    tokenized = tokenize_requests(model, MIXED, CONTEXTS, PARAMS.fact_token)
    got = optimise_values(model, tokenized, PARAMS, site, 1)
    for number, request in enumerate(MIXED):
        want = plain_value(model, request, CONTEXTS, PARAMS, site, 1)
        close(got.initial[number].double(), want.initial, 1e-5)
        close(got.values[number].double(), want.value, 1e-5)
        assert got.loss[number] == pytest.approx(want.losses[int(got.steps[number]) - 1], rel=1e-4)


def test_what_is_to_vanish_never_stops_early() -> None:
    """A probability that is small to begin with would else be no more than what the loss stops at."""
    model = editable("gpt2")
    request = replace(unlikely(model, "w17 w18 {}", "w33"), minimise=True)
    tokenized = tokenize_requests(model, [request], CONTEXTS, "subject_last")
    params = replace(PARAMS, v_weight_decay=0.0, v_num_grad_steps=5)
    got = optimise_values(model, tokenized, params, "mlp", 0)
    assert float(got.loss) < 0.05 and got.steps.tolist() == [4]
    assert not torch.equal(got.values, got.initial)


@pytest.mark.parametrize("site", ["mlp", "layer"])
def test_the_last_layer_carries_what_ends_the_prompt(site: str) -> None:
    model = tiny_model("llama")
    ends, middle = MIXED[4], MIXED[0]
    params = replace(PARAMS, layers=(LAYERS - 1,))
    got = optimise_values(model, tokenize_requests(model, [ends], CONTEXTS, "subject_last"), params, site, LAYERS - 1)
    close(got.values[0], plain_value(model, ends, CONTEXTS, params, site, LAYERS - 1).value)
    with pytest.raises(ValueError, match="nothing behind it can carry a change"):
        tokenized = tokenize_requests(model, [ends, middle], CONTEXTS, "subject_last")
        optimise_values(model, tokenized, params, site, LAYERS - 1)


@pytest.mark.parametrize("noise", [None, ke.SubjectNoise(0.2)])
def test_as_released_a_layer_with_nothing_behind_it_changes_nothing(noise) -> None:
    model = tiny_model("gpt2")
    requests = [replace(request, noise=noise) for request in (MIXED[0], MIXED[4])]
    tokenized = tokenize_requests(model, requests, CONTEXTS, "subject_last", compat="hase")
    got = optimise_values(model, tokenized, PARAMS, "mlp", LAYERS - 1, compat="hase")
    assert torch.equal(got.values[0], got.initial[0]) and not torch.equal(got.values[1], got.initial[1])
    assert got.steps.tolist() == [0, PARAMS.v_num_grad_steps - 1]


def test_as_released_noise_is_drawn_on_and_on() -> None:
    """A row of each prompt, pass after pass, out of one random state; the same whatever else is in the batch."""
    model = tiny_model("gpt2")
    request = replace(MIXED[2], noise=ke.SubjectNoise(0.3, seed=4))
    drawn = []

    def optimised(requests):
        tokenized = tokenize_requests(model, requests, CONTEXTS, "subject_last", compat="hase")
        values = optimise_values(model, tokenized, PARAMS, "mlp", 1, compat="hase")
        drawn.append(tokenized[0].stream.draw(1)[0].noise)
        return values.values[0]

    alone, beside = optimised([request]), optimised([request, MIXED[0], replace(MIXED[1], noise=None)])
    close(beside, alone)
    state = np.random.RandomState(4)
    for _ in range(PARAMS.v_num_grad_steps):
        state.randn(len(CONTEXTS) + 1, 3, model.hidden_size)
    want = 0.3 * torch.from_numpy(state.randn(1, 3, model.hidden_size))[0]
    assert all(torch.equal(got, want) for got in drawn)
    with pytest.raises(ValueError, match="noise has 2 samples: as released"):
        tokenize_requests(model, [MIXED[2]], CONTEXTS, "subject_last", compat="hase")


# -- edits -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def likelihood(model: ke.EditableModel, request: ke.EditRequest) -> float:
    """p(target) under the request's own input, the mean over its draws."""
    ids, subject = spell(model, request)
    target = model.tokenizer(request.target_new).input_ids
    draws = plain_noise(model, request, subject)
    with noised(model, [(subject, noise) for noise in draws]):
        logits = model.hf(torch.tensor([ids + target[:-1]] * len(draws)), use_cache=False).logits
    logp = logits.log_softmax(-1)[:, len(ids) - 1 :]
    return float(sum(logp[:, n, token] for n, token in enumerate(target)).exp().mean())


def asked_of(model: ke.EditableModel) -> list[ke.EditRequest]:
    """Of everything one, about subjects of their own."""
    likely = ke.EditRequest("w17 w18 {}", "w33", f"w{_answer(model, 'w17 w18 w33')}", minimise=True)
    return [
        unlikely(model, "w5 {} w9", "w3 w7"),
        likely,
        replace(unlikely(model, "w9 {} w10", "w40"), noise=ke.SubjectNoise(0.05, samples=2)),
    ]


@torch.no_grad()
def _answer(model: ke.EditableModel, text: str) -> int:
    return int(model.hf(torch.tensor([model.tokenizer(text).input_ids])).logits[0, -1].argmax())


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("method", ["rome", "memit", "ft", "ft-l"])
def test_edits_go_where_they_are_asked_to(method: str, compat: str | None) -> None:
    model = editable("gpt2")
    params = brief(METHODS[method])
    steps = {"v_num_grad_steps": 30, "v_lr": 0.3, "num_steps": 60, "lr": 2e-3, "norm_constraint": 5e-2}
    steps |= {"mom2_update_weight": 0.1, "clamp_norm_factor": 10.0}
    params = replace(params, **{name: v for name, v in steps.items() if getattr(params, name, None)})
    options = {"moments": moments_of(model, params.layers), "contexts": CONTEXTS if method == "rome" else [["{}"]]}
    options = {name: value for name, value in options.items() if METHODS[method].takes(name)} | {"compat": compat}
    for request in asked_of(model):
        edit = ke.edit(model, [request], method, params=params, **options)
        assert ke.EditRequest.of(edit.requests[0]) == request
        before = likelihood(model, request)
        with edit.applied(model):
            after = likelihood(model, request)
        assert after < 0.3 * before if request.minimise else after > 2 * before, (request, before, after)


def test_memit_takes_all_directions_at_once() -> None:
    model = editable("gpt2")
    params = replace(brief(METHODS["memit"]), v_num_grad_steps=30, v_lr=0.3, layers=(0, 1), mom2_update_weight=0.01)
    params = replace(params, clamp_norm_factor=10.0)
    requests = asked_of(model)
    edit = ke.memit(model, requests, params, moments_of(model, (0, 1)), [["{}"]])
    before = [likelihood(model, request) for request in requests]
    with edit.applied(model):
        for request, was in zip(requests, before, strict=True):
            now = likelihood(model, request)
            assert now < was if request.minimise else now > was


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_the_key_is_that_of_the_noised_prompt(method: str) -> None:
    """The mean over contexts and draws, of what the down projection reads at the subject's last token.

    Half of ROME's is the bare prompt's."""
    model, request = tiny_model("llama"), MIXED[2]
    given = moments_of(model, (1,))
    options = {"contexts": CONTEXTS} if method == "rome" else {"contexts": [CONTEXTS]}
    params = replace(brief(METHODS[method]), v_num_grad_steps=2)
    edit = ke.edit(model, [request], method, params=params, moments=given, **options)
    keys = []
    for context in CONTEXTS:
        ids, subject = spell(model, request, context)
        for noise in plain_noise(model, request, subject):
            with (
                torch.no_grad(),
                noised(model, [(subject, noise)]),
                hooked(model.modules.down_projection(1), lambda args, _, at=subject[-1]: keys.append(args[0][0, at])),
            ):
                model.hf(torch.tensor([ids]), use_cache=False)
    assert len(keys) == len(CONTEXTS) * NOISE.samples
    groups = [keys[: NOISE.samples], keys[NOISE.samples :]] if method == "rome" else [keys]
    close(edit.keys[1][:, 0], torch.stack([torch.stack(group).mean(0) for group in groups]).mean(0), 1e-5)


@pytest.mark.parametrize("compat", [None, "hase"])
def test_fine_tuning_against_the_loop(compat: str | None) -> None:
    """Losses by their definition, torch's own Adam, whole prompts; released noise is new in every epoch."""
    model = in_double("gpt2")
    noisy = replace(MIXED[2], noise=ke.SubjectNoise(0.3, samples=3, seed=2))
    requests = [MIXED[1], noisy, MIXED[0]]
    params = ke.FTParams(layers=(1, 2), num_steps=4, lr=1e-2, norm_constraint=0.03)
    edit = ke.finetune(model, requests, params, compat)
    other = in_double("gpt2")
    named = dict(other.hf.named_parameters())
    kinds = ("weight",) if compat is None else ("weight", "bias")
    trained = {f"transformer.h.{n}.mlp.c_proj.{kind}": None for n in (1, 2) for kind in kinds}
    before = {name: named[name].detach().clone() for name in trained}
    optimiser = torch.optim.Adam([named[name].requires_grad_() for name in trained], lr=1e-2)
    state = np.random.RandomState(2)
    for _ in range(4):
        losses = []
        for request in requests:
            ids, subject = spell(other, request)
            target = other.tokenizer(request.target_new).input_ids
            draws = plain_noise(other, request, subject)
            if compat == "hase" and request.noise is not None:
                draws = list(0.3 * torch.from_numpy(state.randn(3, len(subject), other.hidden_size)))
            with torch.enable_grad(), noised(other, [(subject, noise) for noise in draws]):
                logits = other.hf(torch.tensor([ids + target[:-1]] * len(draws)), use_cache=False).logits
            logp = logits.log_softmax(-1)[:, len(ids) - 1 :]
            nll = -sum(logp[:, n, token] for n, token in enumerate(target))  # [draws]
            if request.minimise:
                losses.append(torch.exp(-nll).sum() if compat else torch.exp(-nll).mean())
            else:
                losses.append(nll.sum() if compat else nll.mean() / len(target))
        loss = sum(losses) if compat else sum(losses) / len(losses)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for name, was in before.items():
                named[name].clamp_(was - 0.03, was + 0.03)
    assert set(edit.changes) == set(trained)
    for name, was in before.items():
        close(edit.delta(name).double(), named[name].detach() - was, 1e-5)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"rome", "r-rome", "memit", "ft", "ft-l"}))
@pytest.mark.parametrize("change", [{"minimise": True}, {"noise": 0.1}])
def test_other_methods_refuse_them(name: str, change: dict) -> None:
    model, method = tiny_model("gpt2"), METHODS[name]
    options = {"moments": moments_of(model, (1,))} if method.takes("moments") else {}
    request = ke.EditRequest.of(RECORDS[0])
    with pytest.raises(ValueError, match=r"which this method does not take: rome, r_rome, memit and finetune do"):
        ke.edit(model, [replace(request, **change)], name, params=brief(method), **options)


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", MIXED)
def test_a_request_is_what_it_says_it_is(request_) -> None:
    assert ke.EditRequest.of(request_.to_dict()) == request_


@pytest.mark.parametrize(
    "change, message",
    [
        ({"minimise": "yes"}, "minimise is 'yes'"),
        ({"noise": -1.0}, "noise level is -1.0: expected "),
        ({"noise": float("nan")}, "noise level is nan"),
        ({"noise": True}, "noise is True"),
        ({"noise": "m"}, "noise level 'm' needs texts"),
        ({"noise": {"samples": 3}}, "expected level, and maybe samples and seed"),
        ({"noise": {"level": 1.0, "size": 3}}, "expected level, and maybe samples and seed"),
        ({"noise": {"level": 1.0, "samples": 0}}, "samples is 0"),
    ],
)
def test_what_a_request_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ke.EditRequest.of(MIXED[0].to_dict() | change)


def test_contradictions() -> None:
    plain, less = MIXED[0], replace(MIXED[0], minimise=True)
    noisy = replace(plain, noise=NOISE)
    with pytest.raises(ValueError, match="both 'w20' and less of 'w20'"):
        check_requests([plain, less], problems=True)
    with pytest.raises(ValueError, match="both 'w20' and 'w21'"):
        check_requests([noisy, replace(noisy, target_new=" w21")], problems=True)
    kept = [plain, plain, noisy, replace(noisy, noise=replace(NOISE, seed=2), target_new=" w21")]
    assert check_requests(kept, problems=True) == kept  # other inputs, other keys


def test_nobody_is_warned_of_what_was_asked_for() -> None:
    model = editable("gpt2")
    says = f"w{_answer(model, 'w17 w18 w33')}"
    params, options = replace(brief(METHODS["rome"]), v_num_grad_steps=2), {"contexts": ["{}"]}
    request = ke.EditRequest("w17 w18 {}", "w33", says)
    given = moments_of(model, (1,))
    with pytest.warns(UserWarning, match="is already continued with"):
        ke.rome(model, request, params, given, **options)
    for change in ({"target_true": says}, {"minimise": True}, {"noise": 0.1}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ke.rome(model, replace(request, **change), params, given, **options)


# -- the five ----------------------------------------------------------------------------------------------------------


def test_each_problem() -> None:
    model, record = tiny_model("gpt2"), RECORDS[0]
    asked = {name: ke.as_problem(model, record, name, noise=0.2) for name in PROBLEMS}
    want = {"error_injection": " w20 w23", "fact_erasure": " w50", "fact_amplification": " w50", "fact_forcing": " w50"}
    assert {name: asked[name].target_new for name in want} == want
    assert [name for name, request in asked.items() if request.minimise] == ["fact_erasure"]
    assert [name for name, request in asked.items() if request.noise] == ["fact_forcing"]
    assert asked["fact_forcing"].noise == ke.SubjectNoise(0.2)
    assert all(request.target_true == " w50" and request.case_id == 0 for request in asked.values())
    rule = ke.as_problem(model, record, "fact_forcing").noise
    assert rule.level == ke.noise_level(model, "s3", subjects=["w3 w7"])
    assert ke.as_problem(model, record, "fact_forcing", "u0.1").noise.level == "u0.1"


@pytest.mark.parametrize("family", FAMILIES)
def test_reversal_asks_for_what_is_said_under_noise(family: str) -> None:
    model = tiny_model(family)
    record = {**RECORDS[0], "requested_rewrite": {**RECORDS[0]["requested_rewrite"], "target_true": {"str": "w50 w4"}}}
    request = ke.as_problem(model, record, "tracing_reversal", noise=ke.SubjectNoise(1.5, samples=4, seed=3))
    ids, subject = spell(model, ke.EditRequest.of(record))
    noise = 1.5 * torch.from_numpy(np.random.RandomState(3).randn(1, len(subject), model.hidden_size))[0]
    answer: list[int] = []
    for _ in range(2):
        with torch.no_grad(), noised(model, [(subject, noise)]):
            answer.append(int(model.hf(torch.tensor([ids + answer]), use_cache=False).logits[0, -1].argmax()))
    assert (
        request.target_new == model.tokenizer.decode(answer, skip_special_tokens=True)
        and request.noise is None
        and request.space is False
    )
    whole = ke.as_problem(model, record, "tracing_reversal", noise=1.5, compat="hase").target_new
    assert whole.startswith("w5 w3 w7 w9 w10 ") and 5 < len(model.tokenizer(whole).input_ids) <= 12
    assert whole == ke.as_problem(model, record, "tracing_reversal", noise=1.5, compat="hase").target_new


def test_what_is_no_problem() -> None:
    model, record = tiny_model("gpt2"), RECORDS[0]
    with pytest.raises(ValueError, match="unknown problem 'forcing': expected one of error_injection, "):
        ke.as_problem(model, record, "forcing")
    with pytest.raises(ValueError, match="has no target_true"):
        ke.as_problem(model, MIXED[0], "fact_erasure")


def test_the_record_of_a_problem_asks_about_its_target() -> None:
    model, record = tiny_model("gpt2"), RECORDS[0]
    request = ke.as_problem(model, record, "fact_erasure")
    asked = problem_record(record, request)
    assert asked["requested_rewrite"]["target_new"]["str"] == asked["requested_rewrite"]["target_true"]["str"] == " w50"
    [case] = ke.evaluate(model, [asked], generation=False).cases
    [seen] = case["pre"]["rewrite_prompts_probs"]
    assert seen["target_new"] == seen["target_true"]
    assert np.exp(-seen["target_new"]) == pytest.approx(likelihood(model, request), rel=1e-4)
