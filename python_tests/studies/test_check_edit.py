"""An edit's traffic light: every number against Hugging Face's own forward, every kind of damage found."""

from __future__ import annotations

import json
import math

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing.changes import LowRank
from knowedit_ext.studies.bystanders import SUBJECTS
from knowedit_ext.studies.check_edit import Limits
from knowedit_ext.world import load_world

from ..support.unchanged import assert_unchanged, snapshot

COUNT = 4


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return ke.load_model(load_world().folder, dtype="float32")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return load_world().records()[10 : 10 + COUNT]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return load_world().fillers(6)


@pytest.fixture(scope="module")
def edit(model, records) -> ke.Edit:
    moments = ke.collect_moments(model, load_world().statements()[:400], layers=[1, 2, 3])
    return ke.memit(model, records, ke.MEMITParams.preset("world"), moments)


def scaled(edit: ke.Edit, factor: float) -> ke.Edit:
    changes = {n: LowRank(c.inputs, factor * c.outputs, c.input_first) for n, c in edit.changes.items()}
    return ke.Edit(changes, edit.method, edit.requests, model=edit.model, base=edit.base)


@torch.no_grad()
def plain(model, prompt: str, target: str) -> tuple[float, bool]:
    """Mean negative log-probability of a target's tokens, and whether each is the likeliest."""
    ids, whole = (model.tokenizer(text).input_ids for text in (prompt, prompt + target))
    logp = model.hf(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
    places = range(len(ids) - 1, len(whole) - 1)
    nll = -sum(float(logp[n, whole[n + 1]]) for n in places) / len(places)
    return nll, all(int(logp[n].argmax()) == whole[n + 1] for n in places)


def shares(model, records) -> dict[str, float]:
    found: dict[str, list[bool]] = {"efficacy": [], "generalisation": [], "neighbourhood": []}
    for record in records:
        rewrite = record["requested_rewrite"]
        new, true = (" " + rewrite[key]["str"] for key in ("target_new", "target_true"))
        own = [rewrite["prompt"].format(rewrite["subject"])]
        kinds = (
            own,
            record["paraphrase_prompts"],
            record["neighborhood_prompts"],
        )
        for (name, done), prompts in zip(found.items(), kinds, strict=True):
            for prompt in prompts:
                (a, said), (b, _) = plain(model, prompt, new), plain(model, prompt, true)
                done.append(b < a if name == "neighbourhood" else a < b or said)
    return {name: 100.0 * sum(done) / len(done) for name, done in found.items()}


@torch.no_grad()
def perplexity(model, texts) -> float:
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([model.tokenizer(text).input_ids[:128]])
        logp = model.hf(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        total -= float(logp.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return math.exp(total / count)


@pytest.mark.parametrize("factor", [1.0, 0.3, 8.0])
def test_every_number_is_that_of_the_plain_forward(model, records, texts, edit, factor) -> None:
    edit = scaled(edit, factor)
    as_it_was = snapshot(model.hf)
    found = {one.name: one for one in ke.check_edit(model, edit, records, texts=texts).measures}
    assert_unchanged(as_it_was, model.hf)
    before, read = shares(model, records), perplexity(model, texts)
    with edit.applied(model):
        after, read_after = shares(model, records), perplexity(model, texts)
        norms = {name: float(model.hf.get_parameter(name).double().norm()) for name in edit.changes}
    assert {name: (found[name].before, found[name].after) for name in before} == {
        name: (before[name], after[name]) for name in before
    }
    assert (found["perplexity"].before, found["perplexity"].after) == pytest.approx((read, read_after), rel=1e-4)
    grown = max(norms, key=lambda name: norms[name] / float(model.hf.get_parameter(name).norm()))
    assert found["norm"].after == pytest.approx(norms[grown], rel=1e-5)
    assert found["norm"].before == pytest.approx(float(model.hf.get_parameter(grown).norm()), rel=1e-5)


def lights(model, edit, *args, **options) -> dict[str, str]:
    return {one.name: one.light for one in ke.check_edit(model, edit, *args, **options).measures}


def test_a_good_edit_is_not_red_and_each_damage_is_found(model, records, texts, edit) -> None:
    good = ke.check_edit(model, edit, records, texts=texts)
    assert good.light in ("green", "yellow")
    assert {one.name for one in good.measures if one.light != "green"} <= {"norm"}
    idle = lights(model, scaled(edit, 1e-3), records, texts=texts)
    assert idle["efficacy"] == idle["generalisation"] == "red"
    assert idle["neighbourhood"] == idle["perplexity"] == "green"
    name = next(iter(edit.changes))
    noise = torch.randn(model.hf.get_parameter(name).shape, generator=torch.Generator().manual_seed(0))
    noisy = ke.Edit({name: 3.0 * noise}, "noise", edit.requests, model=edit.model, base={name: edit.base[name]})
    broken = lights(model, noisy, records, texts=texts)
    assert broken["efficacy"] == broken["perplexity"] == "red"
    assert broken["norm"] == "yellow"
    leaking = leak(model, records[:1])
    assert lights(model, leaking, records, texts=texts)["neighbourhood"] == "red"


def leak(model, records) -> ke.Edit:
    """Says the new target of whatever is asked with these words: fine-tuned without bound on one layer."""
    return ke.finetune(model, records, ke.FTParams(layers=(5,), lr=0.05, num_steps=30))


def test_reasons_begin_with_the_worst(model, records, texts, edit) -> None:
    found = ke.check_edit(model, scaled(edit, 1e-3), records, texts=texts)
    assert found.light == "red"
    assert found.reasons[0].startswith("efficacy: the new target comes at 0 of 4 prompts")
    assert "**red**" in found.table() and found.to_dict()["light"] == "red"


def test_limits_decide(model, records, texts, edit) -> None:
    strict = ke.check_edit(model, edit, records, texts=texts, limits={"norm": (0.0, 0.0)})
    assert strict.light == "red"
    assert strict.reasons[0].startswith("norm of ")


def test_without_records_others_are_asked_the_same(model, records, texts, edit) -> None:
    found = {one.name: one for one in ke.check_edit(model, edit, texts=texts).measures}
    assert set(found) == {"efficacy", "neighbourhood", "perplexity", "norm"}
    assert found["neighbourhood"].before == 100.0  # what the model says itself
    kept = count = 0
    for record in records:
        rewrite = record["requested_rewrite"]
        for subject in SUBJECTS:
            prompt = rewrite["prompt"].format(subject)
            ids = torch.tensor([model.tokenizer(prompt).input_ids])
            own = int(model.hf(ids, use_cache=False).logits[0, -1].argmax())
            target = " " + rewrite["target_new"]["str"]
            tokens = len(model.tokenizer(prompt + target).input_ids) - ids.shape[1]
            with edit.applied(model):
                p = float(model.hf(ids, use_cache=False).logits[0, -1].softmax(-1)[own])
                new = math.exp(-tokens * plain(model, prompt, target)[0])
            kept += p >= new * (1 - 1e-6)
            count += 1
    assert found["neighbourhood"].after == pytest.approx(100.0 * kept / count)


def test_bad_input(model, records, texts, edit) -> None:
    bare = ke.Edit(edit.changes, model=edit.model, base=edit.base)
    with pytest.raises(ValueError, match="no requests"):
        ke.check_edit(model, bare, texts=texts)
    less = ke.Edit(edit.changes, requests=[{**edit.requests[0], "minimise": True}], model=edit.model, base=edit.base)
    with pytest.raises(ValueError, match="--problem"):
        ke.check_edit(model, less, texts=texts)
    with edit.applied(model), pytest.raises(ValueError, match="already applied"):
        ke.check_edit(model, edit, texts=texts)
    with pytest.raises(ValueError, match="no text has two tokens"):
        ke.check_edit(model, edit, texts=[])
    with pytest.raises(TypeError):
        ke.check_edit(model, edit, limits={"fluency": (1, 2)})


@pytest.mark.parametrize("limits", [{"efficacy": (80, 95)}, {"norm": (10, 1)}, {"efficacy": (80, None)}, {"norm": 3}])
def test_limits_that_make_no_sense(limits) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        Limits(**limits)


def test_command(model, edit, tmp_path, monkeypatch, capsys) -> None:
    from knowedit_ext.cli import main

    def run(which: ke.Edit) -> int:
        which.save(tmp_path / "edit.safetensors")
        arguments = ["knowedit", "check-edit", "world", "--edit", str(tmp_path / "edit.safetensors")]
        monkeypatch.setattr("sys.argv", [*arguments, "--out", str(tmp_path / "check.json")])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0

    assert run(edit) == 0
    assert "| efficacy | 0 | 100 | green |" in capsys.readouterr().out
    assert run(scaled(edit, 1e-3)) == 1
    assert json.loads((tmp_path / "check.json").read_text())["light"] == "red"
