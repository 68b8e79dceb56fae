"""AlphaEdit, EMMET and PMET of EasyEdit: against plain readings of their systems, and against the library itself."""

from __future__ import annotations

import json
import types

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.compat import ahead, easyedit, neurons
from knowedit_ext.compat.swap import NotServed, Upstream

from ..editing.plain import moments_of
from .clones import CONFORMANCE, clone, run, write_folder
from .test_alone import ASKED, CONTEXTS, LAYERS, hparams, model  # noqa: F401

GROUPS = [CONTEXTS[:1], CONTEXTS[1:]]
SHARED = dict(layers=(1, 2), v_num_grad_steps=4, clamp_norm_factor=4.0, v_loss_layer=3)


@pytest.fixture(autouse=True)
def contexts(hparams) -> None:  # noqa: F811
    easyedit.CONTEXT_TEMPLATES_CACHE |= {kin.name: GROUPS for kin in easyedit.KINS}


def requests(asked: list[dict]) -> list[ke.EditRequest]:
    return [ke.EditRequest.of({**one, "target_new": f" {one['target_new']}", "space": False}) for one in asked]


def agree(one: torch.Tensor, other: torch.Tensor, close: float = 1e-4) -> None:
    torch.testing.assert_close(one.double(), other.double(), rtol=close, atol=close * float(other.abs().max()))


def named(layer: int) -> str:
    return f"transformer.h.{layer}.mlp.c_proj.weight"


@pytest.mark.parametrize("count", [1, 3])
def test_emmet_with_its_lambda_even_for_one(model, hparams, count) -> None:  # noqa: F811
    asked = requests(ASKED[:count])
    settings = hparams(layers=[1], emmet_lambda=0.3, mom2_update_weight=2.0, update_norm_lambda=0.5)
    [(adjusted, resid)] = easyedit.execute_emmet(model.hf, model.tokenizer, ASKED[:count], settings).values()
    params = ke.MEMITParams(**SHARED | dict(layers=(1,)))
    plain = ke.memit(model, asked, params, moments_of(model, LAYERS), contexts=GROUPS)
    keys, moment = plain.keys[1].double(), moments_of(model, LAYERS)[1].matrix().double()
    inverse = torch.inverse(2.0 * moment + 0.5 * torch.eye(len(moment), dtype=torch.float64))  # emmet_main.py:199-213
    small = keys.T @ inverse @ keys + 0.3 * torch.eye(count, dtype=torch.float64)
    agree(adjusted, (torch.inverse(small) @ keys.T @ inverse).T)
    assert adjusted.dtype == resid.dtype == torch.float64 and resid.shape == (model.hidden_size, count)
    agree(resid, plain.changes[named(1)].outputs)


def alphaedit(model, settings, asked, home):  # noqa: F811
    upstream = Upstream(home, lambda *_: None)
    return easyedit.execute_alphaedit(model.hf, model.tokenizer, asked, settings, upstream=upstream)


def test_alphaedit_by_the_projections_and_sums_that_its_module_keeps(model, hparams) -> None:  # noqa: F811
    """AlphaEdit_main.py:66-96, 236-241, 268-270; then the same batch by the product's own AlphaEdit."""
    moments, threshold = moments_of(model, LAYERS), 0.05
    home = types.ModuleType("AlphaEdit_main")
    home.P = torch.zeros(2, *moments[1].matrix().shape)
    for number, layer in enumerate(LAYERS):
        vectors, sizes, _ = torch.linalg.svd(moments[layer].matrix())
        kept = vectors[:, sizes < threshold]
        assert 0 < kept.shape[1] < len(kept)
        home.P[number] = kept @ kept.T
    home.cache_c = torch.zeros_like(home.P)
    settings = hparams(layers=LAYERS, nullspace_threshold=threshold, L2=2.0, P_loc="")
    params = ke.AlphaEditParams(**SHARED, nullspace_threshold=threshold, L2=2.0)
    with pytest.raises(ValueError, match="made by EasyEdit's apply_AlphaEdit_to_model"):
        alphaedit(model, settings, ASKED[:1], types.ModuleType("nothing"))
    earlier: list[ke.Edit] = []
    for part in (ASKED[:1], ASKED[1:]):
        before = home.cache_c.double()
        given = alphaedit(model, settings, part, home)
        own = ke.alphaedit(model, requests(part), params, moments, contexts=GROUPS, earlier=earlier)
        earlier.append(own)
        assert list(given) == [named(layer) for layer in LAYERS]
        for number, layer in enumerate(LAYERS):
            change = given[named(layer)]
            assert change.dtype == torch.float32 and change.shape == model.hf.get_parameter(named(layer)).shape
            keys, resid = own.keys[layer].double(), own.changes[named(layer)].outputs.double()
            project = home.P[number].double()
            system = project @ (keys @ keys.T + before[number]) + 2.0 * torch.eye(len(keys), dtype=torch.float64)
            agree(change, torch.linalg.solve(system, project @ keys @ resid.T))
            agree(change, own.delta(named(layer)), 1e-3)  # projections are kept in float32
            agree(home.cache_c[number], before[number] + keys @ keys.T)


def test_pmet_and_what_of_it_is_theirs(model, hparams) -> None:  # noqa: F811
    one, model.hf.name_or_path = "transformer.h.{}.mlp.c_proj", "some/gpt2-tiny"
    settings = hparams(layers=LAYERS, nll_loss_factor=1.0, rewrite_module_tmps=[one])
    given = easyedit.execute_pmet(model.hf, model.tokenizer, ASKED, settings)
    params = ke.PMETParams(
        **SHARED, nll_loss_factor=1.0, mom2_update_weight=100.0, v_lr=0.5, kl_factor=0.0625, v_weight_decay=0.5
    )
    own = ke.pmet(model, requests(ASKED), params, moments_of(model, LAYERS), contexts=GROUPS)
    for name, change in given.items():
        assert change.dtype == torch.float64 and change.shape == model.hf.get_parameter(name).shape
        agree(change, own.delta(name))
    two = hparams(layers=LAYERS, nll_loss_factor=1.0, rewrite_module_tmps=[one, "transformer.h.{}.attn.c_proj"])
    with pytest.raises(NotServed, match="down projection alone"):
        easyedit.execute_pmet(model.hf, model.tokenizer, ASKED, two)
    with pytest.raises(NotServed, match="a cache"):
        easyedit.execute_pmet(model.hf, model.tokenizer, ASKED, settings, "values_{}_{}_{}_{}.npz")
    model.tokenizer.padding_side = "left"
    try:
        with pytest.raises(NotServed, match="padding on the left"):
            easyedit.execute_pmet(model.hf, model.tokenizer, ASKED, settings)
    finally:
        model.tokenizer.padding_side = "right"


@pytest.mark.parametrize("name, given", [("openai/gpt2", " w20"), ("other", "w20")])
def test_pmet_gives_a_space_to_gpts_alone(model, name, given) -> None:  # noqa: F811
    model.hf.name_or_path = name
    assert easyedit._target({"target_new": "w20"}, "PMET", model.hf) == given
    assert easyedit._target({"target_new": "w20"}, "EMMET", model.hf) == " w20"
    assert easyedit._target({"target_new": " w20"}, "AlphaEdit", model.hf) == " w20"


@pytest.mark.parametrize("algorithm", ["memit", "emmet", "pmet"])
def test_values_of_requests_to_come_are_computed_together(model, hparams, algorithm, monkeypatch) -> None:  # noqa: F811
    from knowedit_ext.compat import closed_form

    model.hf.name_or_path = "some/gpt2-tiny"
    settings = hparams(layers=LAYERS, nll_loss_factor=1.0, rewrite_module_tmps=["transformer.h.{}.mlp.c_proj"])
    execute, count = getattr(easyedit, f"execute_{algorithm}"), []
    alone = [execute(model.hf, model.tokenizer, [one], settings) for one in ASKED]
    values = closed_form.closed_form_values
    counted = lambda m, asked, *rest: count.append(len(asked)) or values(m, asked, *rest)  # noqa: E731
    monkeypatch.setattr(closed_form, "closed_form_values", counted)
    with ahead.planned(ASKED):
        together = [execute(model.hf, model.tokenizer, [one], settings) for one in ASKED]
    assert count == ([1] * len(ASKED) if algorithm == "emmet" else [len(ASKED)])  # EMMET's edits stay in the model
    for one, other in zip(alone, together, strict=True):
        for name in one:
            pairs = zip(one[name], other[name], strict=True) if algorithm != "pmet" else [(one[name], other[name])]
            for a, b in pairs:
                agree(a, b)


def test_knowledge_neurons_and_whose_are_theirs(model, monkeypatch) -> None:  # noqa: F811
    tok, texts = model.tokenizer, ["w5 w3 w7 w9 w10", "w3 w7 w9", "w33 w9"]
    searched = types.SimpleNamespace(model=model.hf, tokenizer=tok, model_type="gpt2")
    settings = dict(steps=8, batch_size=4, coarse_adaptive_threshold=0.3)
    for prompts, p, refine in ((texts[:1], 0.5, False), (texts, 0.4, True), (texts, 0.4, False)):
        got = easyedit.get_refined_neurons(searched, prompts, "w20 w4", p=p, refine=refine, **settings)
        params = ke.KNParams(steps=8, adaptive_threshold=0.3, p=p, refine=refine)
        request = ke.EditRequest("{} w9 w10", "w5 w3 w7", "w1", target_true="w20 w4")
        own = ke.knowledge_neurons(model, request, params, prompts[1:] or None, compat="reference")
        assert got == [list(neuron) for neuron in own.neurons] and got
    with pytest.raises(NotServed, match="knowledge neurons of a 'bert'"):
        other = types.SimpleNamespace(model=model.hf, tokenizer=tok, model_type="bert")
        easyedit.get_refined_neurons(other, texts, "w20")
    with pytest.raises(NotServed, match="a threshold of neurons"):
        easyedit.get_refined_neurons(searched, texts, "w20", coarse_threshold=0.1)
    monkeypatch.setattr(neurons, "encode_part", lambda *given: (0, 1))
    with pytest.raises(NotServed, match="a special one"):
        easyedit.get_refined_neurons(searched, texts, "w20")


LIBRARY = """
import copy, json, logging, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from knowedit_ext.compat import easyedit
with easyedit.installed():  # what it needs that transformers has dropped
    import easyeditor
    from easyeditor.models.alphaedit import AlphaEdit_main, AlphaEditHyperParams
    from easyeditor.models.emmet import emmet_main, EMMETHyperParams
    from easyeditor.models.pmet import pmet_main, PMETHyperParams
given = json.load(open("given.json"))
model, tok = AutoModelForCausalLM.from_pretrained("gpt2-tiny").eval(), AutoTokenizer.from_pretrained("gpt2-tiny")
tok.pad_token, tok.padding_side = tok.eos_token, "right"
for module in (AlphaEdit_main, emmet_main, pmet_main):
    module.CONTEXT_TEMPLATES_CACHE = given["contexts"]
shared = dict(given["hparams"], model_name="gpt2-xl", layers=[1, 2], layer_selection="all", v_num_grad_steps=5)
shared = {k: v for k, v in shared.items() if k not in ("context_template_length_params", "alg_name")}
moments = [emmet_main.get_cov(model, tok, f"transformer.h.{n}.mlp.c_proj", "wikipedia", 300, "float32",
           hparams=EMMETHyperParams(alg_name="EMMET", **shared)) for n in (1, 2)]
spaces = []
for moment in moments:
    vectors, sizes, _ = torch.linalg.svd(moment)
    spaces.append(vectors[:, len(sizes) // 2:] @ vectors[:, len(sizes) // 2:].T)
torch.save(torch.stack(spaces), "P.pt")
methods = [
    (emmet_main, "execute_emmet", "apply_emmet_to_model", EMMETHyperParams(alg_name="EMMET", **shared), 1e-3),
    (AlphaEdit_main, "execute_AlphaEdit", "apply_AlphaEdit_to_model", AlphaEditHyperParams(
        alg_name="AlphaEdit", nullspace_threshold=0.02, L2=10, P_loc="P.pt", **shared), 1e-3),
    (pmet_main, "execute_pmet", "apply_pmet_to_model", PMETHyperParams(alg_name="PMET", nll_loss_factor=1.0,
        rewrite_module_tmps=[shared["rewrite_module_tmp"]], **shared), 1e-3),
]
weights = {n: p.detach().clone() for n, p in model.named_parameters()}

def edited(module, apply, hparams):
    changes = []
    for part in (given["requests"][:1], given["requests"][1:4]):  # one, then some behind it
        model.load_state_dict(weights, strict=False)
        getattr(module, apply)(model, tok, copy.deepcopy(part), hparams)
        changes.append({n: (p.detach() - weights[n]).double() for n, p in model.named_parameters()
                        if not torch.equal(p, weights[n])})
    model.load_state_dict(weights, strict=False)
    return changes

for module, execute, apply, hparams, close in methods:
    theirs = edited(module, apply, hparams)
    AlphaEdit_main.cache_c_new = False
    used = easyedit.calls().get(execute, 0)
    with easyedit.installed():
        ours = edited(module, apply, hparams)
    assert easyedit.calls().get(execute, 0) == used + 2, execute
    for one, other in zip(ours, theirs):
        assert one.keys() == other.keys() and len(one) == 2, (execute, list(one), list(other))
        for name in one:
            error = float((one[name] - other[name]).norm() / other[name].norm())
            print(execute, name, error)
            assert error < close, (execute, name, error)
"""


def test_of_the_library(tmp_path) -> None:
    folder, place = clone("easyedit"), tmp_path / "library"  # beside the statistics that stand in tmp_path
    vectors = json.loads((CONFORMANCE / "vectors_dropin" / "easyedit.json").read_text())
    memit = next(s for s in vectors["scenarios"] if s["alg"] == "MEMIT" and s["method"] == "batch_edit")
    call = memit["call"]
    asked = [
        {"prompt": p, "subject": s, "target_new": t}
        for p, s, t in zip(call["prompts"], call["subject"], call["target_new"], strict=True)
    ]
    given = {"contexts": vectors["contexts"]["memit"], "hparams": memit["hparams"], "requests": asked}
    write_folder(place, {name: value for name, value in given.items() if name != "hparams"})
    (place / "given.json").write_text(json.dumps(given))
    (place / "script.py").write_text(LIBRARY)
    done = run(["script.py"], place, folder)
    assert done.returncode == 0, done.stderr[-3000:]
