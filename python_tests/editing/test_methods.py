"""What holds for every method of the table, and for one that is added to it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.cli import main
from knowedit_ext.editing.methods import METHODS
from knowedit_ext.evaluation.methods import Editing
from knowedit_ext.runs.files import write_json

from ..support.unchanged import assert_unchanged, snapshot
from ..templates.method import METHOD as NOTHING
from .models import fresh
from .plain import moments_of

LAYERS = (1,)
RECORDS = [
    {
        "case_id": n,
        "requested_rewrite": {
            "prompt": prompt,
            "subject": subject,
            "target_new": {"str": new},
            "target_true": {"str": "w50"},
        },
        "paraphrase_prompts": ["w8 w9"],
        "neighborhood_prompts": ["w10 w9"],
    }
    for n, (prompt, subject, new) in enumerate([("w5 {} w9 w10", "w3 w7", "w20 w23"), ("{} w9", "w33", "w22 w24")])
]
CHANGES = {"v_num_grad_steps": 4, "num_steps": 3, "context_template_length_params": ((3, 2),), "norm_constraint": 1e-3}


@pytest.fixture(params=[*METHODS, NOTHING.name])
def method(request, monkeypatch):
    monkeypatch.setitem(METHODS, NOTHING.name, NOTHING)
    return METHODS[request.param]


def brief(method) -> ke.ROMEParams:
    """Its parameters for the world, made quick, at a layer that all tiny models have."""
    params = method.params_of("world")
    own = {name: value for name, value in CHANGES.items() if getattr(params, name, None)}
    return replace(params, layers=LAYERS, **own)


def edited(model, method, records, compat=None) -> ke.Edit:
    options = {"moments": moments_of(model, LAYERS), "compat": compat, "seed": 3}
    taken = {name: value for name, value in options.items() if method.takes(name)}
    return ke.edit(model, records, method.name, params=brief(method), **taken)


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_leaves_the_model_and_says_what_it_is(method, family: str, compat: str | None, tmp_path) -> None:
    model = fresh(family)
    before = snapshot(model.hf)
    records = RECORDS[:1] if method.single else RECORDS
    edit = edited(model, method, records, compat)
    assert_unchanged(before, model.hf)
    assert edit.method == method.name and edit.params["layers"] == list(LAYERS)
    assert [r["subject"] for r in edit.requests] == [r["requested_rewrite"]["subject"] for r in records]
    assert edit.changes and all(edit.delta(name).abs().max() > 0 for name in edit.changes)
    edit.save(tmp_path / "edit.safetensors")
    again = ke.Edit.load(tmp_path / "edit.safetensors")
    assert (
        again.method == method.name and json.loads(json.dumps(edit.params)) == again.params and again.base == edit.base
    )
    with again.applied(model):
        changed = [
            name
            for name, weight in model.hf.named_parameters()
            if not torch.equal(weight, before["parameters"][name][0])
        ]
        assert changed == list(edit.changes)
    assert_unchanged(before, model.hf)


def test_each_by_itself_is_as_one_by_one(method) -> None:
    model = fresh("llama")
    editing = Editing(model, method.name, brief(method), moments_of(model, LAYERS), seed=3)
    for record, edit in zip(RECORDS, editing(RECORDS), strict=True):
        alone = edited(model, method, [record])
        for name in alone.changes:
            difference = (edit.delta(name) - alone.delta(name)).norm()
            assert difference <= 1e-4 * alone.delta(name).norm()


@pytest.mark.parametrize("compat", [None, "reference"])
def test_evaluated_one_by_one_and_together(method, compat: str | None) -> None:
    model = fresh("gpt2")
    before = snapshot(model.hf)
    for together in [False] if method.single else [False, True]:
        editing = Editing(model, method.name, brief(method), moments_of(model, LAYERS), together, compat=compat)
        report = ke.evaluate(model, RECORDS, editing, generation=False, compat=compat, group=2)
        assert [case["case_id"] for case in report.cases] == [0, 1] and report.summary("post")
        assert_unchanged(before, model.hf)


def test_one_fact_an_edit(method) -> None:
    model = fresh("gpt2")
    if not method.single:
        assert len(edited(model, method, RECORDS).requests) == 2
        return
    with pytest.raises(ValueError, match="one fact at a time"):
        edited(model, method, RECORDS)
    with pytest.raises(ValueError, match="one fact at a time"):
        Editing(model, method.name, brief(method), together=True)


def test_presets_and_files(method, tmp_path) -> None:
    assert "world" in method.presets
    for name in method.presets:
        params = method.params_of(name)
        assert method.params_of(params) is params
        assert method.params_of(params.to_dict()) == params
        write_json(tmp_path / "params.json", params.to_dict())
        assert method.params_of(tmp_path / "params.json") == params
    with pytest.raises(ValueError, match=f"no {method.name} preset 'nobody': there are .*world"):
        method.params_of("nobody")
    with pytest.raises(TypeError, match="expected"):
        method.params_of(3)


def test_command(method, tmp_path, monkeypatch, capsys) -> None:
    requests, out = tmp_path / "requests.json", tmp_path / "edit.safetensors"
    write_json(requests, RECORDS)
    limit = ["--limit", "1"] if method.single else []
    model, moments = fresh("gpt2"), tmp_path / "moments"
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    moments_of(model, LAYERS).save(moments)
    write_json(tmp_path / "params.json", brief(method).to_dict())
    arguments = ["--requests", str(requests), "--method", method.name, "--params", str(tmp_path / "params.json")]
    monkeypatch.setattr(
        "sys.argv",
        ["knowedit", "edit", str(tmp_path / "model"), *arguments, "--moments", str(moments), *limit, "--out", str(out)],
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert f"{method.name}: {'1 request' if limit else '2 requests'}," in capsys.readouterr().out
    assert ke.Edit.load(out).method == method.name


def test_unknown_methods_and_options() -> None:
    model = fresh("gpt2")
    with pytest.raises(ValueError, match=r"unknown method 'mend': expected one of .*memit.*rome"):
        ke.edit(model, RECORDS, "mend", params="world")
    with pytest.raises(TypeError, match="ft takes no 'moments': there are compat, progress"):
        ke.edit(model, RECORDS, "ft", params="world", moments=None)


def test_r_rome_goes_along_romes_published_key() -> None:
    """The plain mean over contexts; but its value is divided by that same key."""
    model = fresh("llama")
    published = edited(model, METHODS["rome"], RECORDS[:1], "reference")
    made = edited(model, METHODS["r-rome"], RECORDS[:1])
    (one,), (other,) = published.changes.values(), made.changes.values()
    assert torch.allclose(one.inputs, other.inputs, atol=1e-6) and not torch.allclose(one.outputs, other.outputs)


def test_r_rome_with_the_bare_prompts_key() -> None:
    """u is the bare prompt's own; what it adds at that key is what ROME adds there, contexts and all."""
    model, given, contexts = fresh("llama"), moments_of(fresh("llama"), LAYERS), ["{}", "w1 w2. {}", "w4. {}"]
    plain = brief(METHODS["r-rome"])
    one_key = replace(plain, enable_prompt_keys=True, enable_random_prefix_keys=False)
    made = ke.r_rome(model, RECORDS[0], one_key, given, contexts=contexts)
    published = ke.rome(model, RECORDS[0], plain, given, contexts=contexts, compat="reference")
    (name,) = made.changes
    alone = ke.rome(model, RECORDS[0], plain, given, contexts=["{}"]).changes[name]
    assert torch.allclose(made.changes[name].inputs, alone.inputs, atol=1e-5)
    key = given[LAYERS[0]].mean.double() @ alone.inputs  # u is C^-1 k: so this is k, up to its length
    added = [edit.changes[name].outputs * (edit.changes[name].inputs * key).sum() for edit in (made, published)]
    assert torch.allclose(*added, rtol=1e-5)
    with pytest.raises(ValueError, match="one of enable_prompt_keys"):
        replace(plain, enable_prompt_keys=True)
