"""Requests in all their forms, and bad ones: a clear error, and a model that is as it was."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

import knowedit_ext as ke
from knowedit_ext.datasets import counterfact, load_counterfact, zsre
from knowedit_ext.editing.methods.memit import MEMITParams, memit
from knowedit_ext.editing.methods.rome import ROMEParams, rome
from knowedit_ext.editing.request import EditRequest, check_requests
from knowedit_ext.evaluation.metrics import asking
from knowedit_ext.moments import Moments

from ..support.tokenizers import word_level
from ..support.unchanged import assert_unchanged, snapshot
from .models import editable, fresh
from .plain import covariance, down_projection, moments_of
from .test_edit import bits

FIELDS = ("prompt", "subject", "target_new", "target_true", "case_id", "space", "requested_rewrite")
TEXTS = st.sampled_from(["{} a", "b", "b is a", "", " ", "{}", "{} {}", "北京", "a\ud800", "a\n"])
ANYTHING = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["str", "id"]), inner, max_size=2),
    max_leaves=3,
)
GOOD = EditRequest("w5 {} w9", "w3 w7", "w20")
ROME = ROMEParams(layers=(0,), v_num_grad_steps=2)
MEMIT = MEMITParams(layers=(0, 1), v_num_grad_steps=2)


def test_the_published_forms() -> None:
    record = {
        "case_id": 1,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
            "subject": "Danielle Darrieux",
        },
        "paraphrase_prompts": [],
    }
    want = EditRequest("The mother tongue of {} is", "Danielle Darrieux", " English", " French")
    assert EditRequest.of(record) == want == EditRequest.of(record["requested_rewrite"]) == EditRequest.of(want)
    assert EditRequest.of(want.to_dict()) == want
    plain = {"prompt": "The mother tongue of Danielle Darrieux is", "subject": "Danielle Darrieux"}
    assert EditRequest.of(plain | {"target_new": "English", "target_true": "French"}) == want
    assert EditRequest.of(plain | {"target_new": {"str": " English"}}).target_true is None
    assert check_requests([record, want]) == [want, want]
    assert check_requests(record) == check_requests(want) == [want]


def test_targets_get_their_space() -> None:
    assert EditRequest("{} a", "b", "c", "d") == EditRequest("{} a", "b", " c", " d")


# prompt, subject, target, and the target as it is learnt by default
WRITINGS = [
    ("{} plays the", "Anna", "harp", " harp"),
    ("{}的首都是", "中国", "北京", "北京"),
    ("user: who plays the {}?\nassistant:\n", "harp", "Anna", "Anna"),
    ("Who plays the {}? A:", "harp", "Anna", " Anna"),
]


@pytest.mark.parametrize("space", [None, True, False])
@pytest.mark.parametrize("prompt, subject, target, default", WRITINGS)
def test_what_is_learnt_is_what_is_asked(prompt: str, subject: str, target: str, default: str, space) -> None:
    """One rule for a request, a fact, a record and the questions about it; it outlives the dict form."""
    want = {None: default, True: f" {target}", False: target}[space]
    request = EditRequest(prompt, subject, target, target, space=space)
    assert (request.target_new, request.target_true, request.space) == (want, want, space)
    assert EditRequest.of(request.to_dict()) == request
    assert ke.Fact(prompt, subject, target=target, space=space).target == want == request.fact().target
    assert request.fact("Anna! {}").target == want
    rewrite = {"prompt": prompt, "subject": subject, "target_new": {"str": target}, "target_true": {"str": "Bo"}}
    if space is not None:
        rewrite["space"] = space
    record = {
        "case_id": 0,
        "requested_rewrite": rewrite,
        "paraphrase_prompts": [prompt.format("Bo")],
        "neighborhood_prompts": ["{} plays the".format("Bo")],
    }
    assert EditRequest.of(record).target_new == want
    asked, _ = counterfact.ask(None, load_counterfact([record])[0], 0)
    assert [question.targets[0] for question in asked[:2]] == [want] * 2
    assert asked[2].targets[0] == (target if space is False else f" {target}")  # another writing
    question = {"prompt": prompt.format(subject), "target": target}
    more = {"neighborhood_prompts": [question], "portability_prompts": [question]}
    asked, _ = asking(zsre.ask)(None, record | more, 0)
    assert [question.targets for question in asked] == [(want,)] * 4


def test_a_space_of_flat_records() -> None:
    flat = {"case_id": 1, "prompt": "Anna plays the", "subject": "Anna", "target_new": "a", "ground_truth": "b"}
    flat |= {"rephrase_prompt": "Anna has a", "locality_prompt": "Bo plays the"}
    assert "space" not in load_counterfact([flat])[0]["requested_rewrite"]
    assert EditRequest.of(load_counterfact([flat | {"space": False}])[0]).target_new == "a"
    with pytest.raises(ValueError, match="'space' is 'no', expected true or false"):
        load_counterfact([flat | {"space": "no"}])


def test_a_subject_that_is_spelled_out() -> None:
    """Whole words before parts of longer ones."""
    raw = {"prompt": "In Annaburg, Anna plays the", "subject": "Anna", "target_new": "harp"}
    assert EditRequest.of(raw).prompt == "In Annaburg, {} plays the"
    assert EditRequest.of(raw).fact().subject_chars() == (13, 17)
    with pytest.raises(ValueError, match="'Anna' occurs 2 times in prompt 'Anna and Anna': put '{}' in the place of"):
        EditRequest.of(raw | {"prompt": "Anna and Anna"})


def test_braces_say_which_subject() -> None:
    assert EditRequest("b and {}", "b", "c").fact().subject_chars() == (6, 7)
    assert EditRequest("a {}", "b", "c").fact("b b. {}").subject_chars() == (7, 8)


@pytest.mark.parametrize(
    "raw, message",
    [
        ({}, "an edit request lacks prompt, subject, target_new"),
        ({"prompt": "{} a", "subject": "b"}, "lacks target_new"),
        ({"prompt": "{} a", "subject": "b", "target_new": " "}, r"target_new of '{} a' \('b'\) is empty"),
        ({"prompt": "{} a", "subject": "b", "target_new": {"str": ""}}, "target_new .* is empty"),
        (
            {"prompt": "{} a", "subject": "b", "target_new": None},
            "'target_new' of an edit request is None, expected",
        ),
        ({"prompt": "a", "subject": "b", "target_new": "c"}, "subject 'b' does not occur in prompt 'a'"),
        ({"prompt": "{} {}", "subject": "b", "target_new": "c"}, r"prompt '{} {}' has 2 '{}'"),
        ({"prompt": "{} a", "subject": " ", "target_new": "c"}, "the subject .* is empty"),
        ("Anna plays the harp", "an edit request is 'Anna plays the harp': expected an EditRequest, or an object"),
        (None, "an edit request is None"),
        (["prompt"], "an edit request is"),
        ({"requested_rewrite": [GOOD.to_dict()]}, "requested_rewrite is .*; several rewrites are one request each"),
        ({"requested_rewrite": "x"}, "requested_rewrite is 'x': expected an object"),
        (GOOD.to_dict() | {"target_true": ["c"]}, r"'target_true' of an edit request is \['c'\], expected text"),
        (GOOD.to_dict() | {"target_true": {"id": "Q1"}}, "'target_true.str' of an edit request is None"),
        (GOOD.to_dict() | {"target_new": 1990}, "'target_new' of an edit request is 1990"),
        (GOOD.to_dict() | {"target_new": float("nan")}, "'target_new' of an edit request is nan"),
        (GOOD.to_dict() | {"subject": 1250}, "'subject' of an edit request is 1250"),
        (GOOD.to_dict() | {"prompt": b"{} a"}, "'prompt' of an edit request is b'{} a'"),
        (GOOD.to_dict() | {"prompt": None}, "'prompt' of an edit request is None"),
        (GOOD.to_dict() | {"target_new": "a\ud800"}, "target_new is .* half of a character"),
        (GOOD.to_dict() | {"space": "no"}, "space is 'no': expected true or false"),
        (GOOD.to_dict() | {"case_id": "../x"}, "case_id '../x' cannot name a file"),
        (GOOD.to_dict() | {"case_id": 10**400}, "case_id '1000.* cannot name a file"),
        (GOOD.to_dict() | {"case_id": True}, "case_id is True"),
        (GOOD.to_dict() | {"case_id": [1]}, r"case_id is \[1\]"),
    ],
)
def test_requests_that_make_no_sense(raw: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EditRequest.of(raw)


def test_contradictions() -> None:
    same = [EditRequest("{} a", "b", "c"), EditRequest("{} a", "b", " c"), EditRequest("{} a", "B", "d")]
    assert len(check_requests(same)) == 3
    with pytest.raises(
        ValueError, match="contradictory requests: '{} a' with subject 'b' is to become both 'c' and 'd'"
    ):
        check_requests([*same, EditRequest("{} a", "b", "d")])
    spelled = {"prompt": "b a", "subject": "b", "target_new": "d"}
    with pytest.raises(ValueError, match="contradictory"):
        check_requests([same[0], spelled])


@pytest.mark.parametrize("requests", ["Anna plays", b"x", None, 3, [None], ["Anna"], [[GOOD]], [("a", "b", "c")]])
def test_what_is_no_list_of_requests(requests: object) -> None:
    with pytest.raises(ValueError, match="an edit request is|edit requests are .*: expected EditRequests"):
        check_requests(requests)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, ANYTHING)), st.booleans())
def test_any_object_is_a_request_or_an_error(raw: dict, inside: bool) -> None:
    raw = {"requested_rewrite": raw} if inside else raw
    try:
        request = EditRequest.of(raw)
    except ValueError as error:
        assert 0 < len(str(error)) < 500
    else:
        assert EditRequest.of(json.loads(json.dumps(request.to_dict()))) == request


def bad_moments(**changes: float) -> Moments:
    matrices = covariance(editable("gpt2"), [0, 1])
    matrices[0][0, 0] = changes.get("value", 1.0)
    return Moments.from_arrays({layer: (matrix, 600) for layer, matrix in matrices.items()})


BOTH = [
    (dict(request=[]), "no edit requests"),
    (dict(request=EditRequest("w5 {}", "w3 " * 70 + "w4", "w20")), "more than the model's 64 positions"),
    (dict(compat="rome"), "unknown compat 'rome': expected one of None, 'reference', 'hase'"),
    (dict(layers=(0, 7)), r"layer 7 is out of range: the model has layers 0..3"),
    (dict(layers=(-1, 0)), r"layers\[0\] is -1: expected at least 0"),
    (dict(layers=(3,)), r"no moments of layer 3: there are those of 0, 1"),
    (dict(v_loss_layer=4), r"v_loss_layer 4 is out of range: the model has layers 0..3"),
    (dict(moments=None), "moments are needed"),
    (dict(moments=lambda: moments_of(fresh("gpt2", n_inner=48), (0, 1))), "moments of layer 0 are 48 wide, .* 128"),
    (dict(contexts=["w11. {}"]), "begin with the bare prompt"),
    (dict(contexts=["{}", "w11."]), r"context 'w11.': exactly one '{}'"),
    (dict(contexts=["{}", "{} {}"]), r"context '{} {}': exactly one '{}'"),
    (dict(contexts=[]), "begin with the bare prompt"),
]


@pytest.mark.parametrize("method", ["rome", "memit"])
@pytest.mark.parametrize("changes, message", BOTH)
def test_bad_input_leaves_the_model_alone(method: str, changes: dict, message: str) -> None:
    model, changes = editable("gpt2"), dict(changes)
    moments = changes.pop("moments", lambda: moments_of(model, (0, 1)))
    moments = moments() if callable(moments) else moments
    request, compat = changes.pop("request", GOOD), changes.pop("compat", None)
    contexts = changes.pop("contexts", ["{}"])
    params = {"layers": (0, 1), "v_num_grad_steps": 2} | changes
    before = snapshot(model.hf)
    with pytest.raises(ValueError, match=message):
        if method == "rome":
            rome(model, request, ROMEParams(**params), moments, contexts=contexts, compat=compat)
        else:
            memit(
                model, request, MEMITParams(**params), moments, contexts=[contexts] if contexts else [], compat=compat
            )
    assert_unchanged(before, model.hf)
    assert not model.__dict__.get("applied_edits")


def test_the_last_layer_cannot_reach_the_end() -> None:
    model = editable("gpt2")
    with pytest.raises(ValueError, match="layer 3 is the last one before the loss"):
        rome(model, GOOD, ROMEParams(layers=(3,)), moments_of(model, [3]), contexts=["{}"])


def test_rome_takes_one() -> None:
    model = editable("gpt2")
    two = [GOOD, EditRequest("w5 {} w9", "w8", "w20")]
    with pytest.raises(ValueError, match="ROME edits one fact at a time, not 2"):
        rome(model, two, ROME, moments_of(model, [0]), contexts=["{}"])


@pytest.mark.parametrize(
    "values, message",
    [
        (torch.zeros(2, 32), r"values are \[2, 32\]: expected \[1 requests, 32\]"),
        (torch.zeros(1, 31), r"values are \[1, 31\]"),
        (torch.full((1, 32), torch.nan), "the tensor of values holds NaN"),
        (torch.ones(1, 32, dtype=torch.bool), "the tensor of values is torch.bool"),
        (torch.ones(1, 32, dtype=torch.int64), "the tensor of values is torch.int64"),
    ],
)
def test_values_that_do_not_fit(values: torch.Tensor, message: str) -> None:
    model = editable("gpt2")
    with pytest.raises(ValueError, match=message):
        memit(model, GOOD, MEMIT, moments_of(model, (0, 1)), contexts=[["{}"]], values=values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not(bad: float) -> None:
    with pytest.raises(ValueError, match="layer 0.* not finite|layer 0 hold NaN"):
        rome(editable("gpt2"), GOOD, ROME, bad_moments(value=bad), contexts=["{}"])
    model = fresh("gpt2")
    moments, weight = moments_of(model, [0]), down_projection(model, 0).weight
    with torch.no_grad():
        weight[3, 3] = bad
    with pytest.raises(ValueError, match="'transformer.h.0.mlp.c_proj.weight' holds NaN or infinite numbers"):
        rome(model, GOOD, ROME, moments, contexts=["{}"])


@pytest.mark.parametrize("name", ["transformer.h.3.attn.c_attn.weight", "transformer.ln_f.weight", "lm_head.weight"])
def test_weights_behind_the_edited_layers_that_are_not_finite(name: str) -> None:
    model = fresh("gpt2")
    with torch.no_grad():
        model.hf.get_parameter(name).view(-1)[5] = torch.nan
    moments, before = moments_of(editable("gpt2"), (0, 1)), bits(model)
    for method, params, contexts in ((rome, ROME, ["{}"]), (memit, MEMIT, [["{}"]])):
        with pytest.raises(ValueError, match="the loss of 'w5 w3 w7 w9' became nan: NaN or infinity in weights"):
            method(model, GOOD, params, moments, contexts=contexts)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, bits(model), strict=True))


def test_a_target_without_tokens() -> None:
    tokenizer = word_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    model = ke.load_model((editable("gpt2").hf, tokenizer))
    with pytest.raises(ValueError, match="target ' ~~' .* no token"):
        rome(model, EditRequest("w5 {} w9", "w3", "~~"), ROME, moments_of(model, [0]), contexts=["{}"])


@torch.no_grad()
def answer(prompt: str, tokens: int) -> str:
    model = editable("gpt2")
    ids = model.tokenizer(prompt).input_ids
    for _ in range(tokens):
        ids.append(int(model.hf(torch.tensor([ids])).logits[0, -1].argmax()))
    return " ".join(f"w{token}" for token in ids[-tokens:])


@pytest.mark.parametrize("tokens", [1, 2])
def test_what_the_model_says_already_is_warned_of(tokens: int) -> None:
    model = editable("gpt2")
    moments, target = moments_of(model, (0, 1)), answer("w5 w3 w7 w10", tokens)
    known = EditRequest("w5 {} w10", "w3 w7", target)
    with pytest.warns(UserWarning, match=f"'w5 w3 w7 w10' is already continued with '{target}'"):
        rome(model, known, ROME, moments, contexts=["{}"])
    with pytest.warns(UserWarning, match="is already continued") as caught:
        memit(model, [EditRequest("w5 {} w9", "w8", "w20"), known], MEMIT, moments, contexts=[["{}"]])
    assert len(caught) == 1
    half = EditRequest("w5 {} w10", "w3 w7", f"{target} w44")
    assert answer("w5 w3 w7 w10", tokens + 1).split()[-1] != "w44"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rome(model, GOOD, ROME, moments, contexts=["{}"])
        rome(model, half, ROME, moments, contexts=["{}"])
