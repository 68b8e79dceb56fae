"""Training: the published loop's steps, what an iteration leaves alone, and runs that are killed."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editors import frozen as frozen_module
from knowedit_ext.editors.data import outer_of, read_data, split_records
from knowedit_ext.editors.texts import Text, texts_of
from knowedit_ext.editors.training import EditorTraining
from knowedit_ext.model.errors import NotFiniteError

from ..editing.models import fresh
from ..support.unchanged import assert_unchanged, snapshot
from .models import efk_editor, mend_editor

EDIT = [Text.of_last([5, 3, 7, 9, 10, 20, 23], 2)]
OUTER = [Text.of_last([3, 7, 11, 20, 23], 2)]
LOC = [Text.of_last([8, 14, 15, 2, 30], 5), Text.of_last([40, 41, 42], 3)]
PARAMS = ke.EditorTrainingParams(accumulate_bs=2, lr=1e-3, lr_lr=1e-2)
MAKE = {"mend": mend_editor, "efk": efk_editor}


def plain_losses(model: ke.EditableModel, editor, factors) -> dict[str, torch.Tensor]:
    """Whole passes of the model with the changes written into its weights."""
    say = lambda text: model.hf(torch.tensor([text.ids]), use_cache=False).logits[0].log_softmax(-1)  # noqa: E731
    before = [say(text).detach() for text in LOC]
    weights = dict(model.hf.named_parameters())
    changed = {}
    for weight in editor.weights:
        inputs, outputs = factors[weight.name]
        change = inputs.T @ outputs
        changed[weight.name] = weights[weight.name].detach() + (change if weight.input_first else change.T)

    def call(text: Text) -> torch.Tensor:
        given = (torch.tensor([text.ids]),)
        out = torch.func.functional_call(model.hf, changed, given, {"use_cache": False})
        return out.logits[0].log_softmax(-1)

    after = [call(text) for text in LOC]
    kl = torch.cat([(b.exp() * (b - a)).sum(-1) for b, a in zip(before, after, strict=True)]).mean()
    logp = call(OUTER[0])
    nll = -torch.stack([logp[at, token] for at, token in OUTER[0].scored]).mean()
    return {"edit": nll, "loc": kl}


@pytest.mark.parametrize("few", [0, 1 << 13])
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "gemma2"])
def test_an_iteration_is_that_of_the_loop(kind: str, family: str, few: int, monkeypatch) -> None:
    """Losses and the gradient of every parameter, against whole passes of the edited model."""
    monkeypatch.setattr("knowedit_ext.model.head.FEW_TOKENS", few)
    model = fresh(family)
    editor = MAKE[kind](model)
    training = EditorTraining(model, editor, PARAMS)
    before = snapshot(model.hf)
    report = training.step(EDIT, OUTER, LOC)
    assert_unchanged(before, model.hf)
    gradients = {name: p.grad.clone() for name, p in editor.network.named_parameters()}
    editor.network.zero_grad()
    again = MAKE[kind](model)
    again.network.train()
    rows = _rows(model, again)
    losses = plain_losses(model, again, again.factors(rows, EDIT[0].ids))
    for name, loss in losses.items():
        assert report[f"loss/{name}"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    ((0.1 * losses["edit"] + losses["loc"]) / 2).backward()
    for name, p in again.network.named_parameters():
        if p.grad is not None:
            assert (gradients[name] - p.grad).norm() <= 2e-3 * p.grad.norm() + 1e-7, name


def _rows(model, editor):
    from knowedit_ext.editors.texts import gradient_rows

    with torch.enable_grad():
        return gradient_rows(model, [EDIT], editor.weights)[0]


def test_steps_clip_and_rates() -> None:
    """The first step has one gradient more; edit_lrs move at lr_lr, under compat at lr; the norm is clipped."""
    for compat, rate in ((None, PARAMS.lr_lr), ("reference", PARAMS.lr)):
        model = fresh("gpt2")
        editor = mend_editor(model)
        before = editor.network.edit_lrs.detach().clone()
        training = EditorTraining(model, editor, PARAMS, compat)
        stepped = [training.step(EDIT, OUTER, LOC)["stepped"] for _ in range(6)]
        assert stepped == [False, False, True, False, True, False]
        again = mend_editor(fresh("gpt2"))
        once = EditorTraining(model, again, PARAMS, compat)
        for _ in range(3):
            once.step(EDIT, OUTER, LOC)
        moved = (again.network.edit_lrs.detach() - before).abs()
        assert torch.allclose(moved, torch.full_like(moved, rate), rtol=1e-2)  # Adam's first step


@pytest.mark.parametrize("rows", [4096, 1, 13])
@pytest.mark.parametrize("kind", MAKE)
def test_iterations_together_are_as_one_by_one(kind: str, rows: int, monkeypatch) -> None:
    """All that lies between two steps is computed together, in as many passes as there is room for."""
    monkeypatch.setattr("knowedit_ext.editors.training.default_max_rows", lambda model: rows)
    shifted = lambda text, by: Text(tuple(n + by for n in text.ids), tuple(n + by * (n > 0) for n in text.labels))  # noqa: E731
    batches = [tuple([shifted(text, by) for text in part] for part in (EDIT, OUTER, LOC)) for by in range(7)]
    alone, together = (MAKE[kind](fresh("gpt2")) for _ in range(2))
    one = EditorTraining(fresh("gpt2"), alone, PARAMS)
    want = [one.step(*batch) for batch in batches]
    got = EditorTraining(fresh("gpt2"), together, PARAMS).steps(batches)
    for a, b in zip(got, want, strict=True):
        assert a["stepped"] == b["stepped"]
        for key in ("loss/edit", "loss/loc", *(["grad"] if a["stepped"] else [])):
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=1e-6)
    assert [n for n, report in enumerate(got) if "norms" in report] == [2, 4, 6]
    for name, x in alone.tensors.items():
        assert torch.allclose(together.tensors[name], x, rtol=1e-4, atol=1e-6), name


def test_it_begins_to_learn_where_all_units_are_at_zero() -> None:
    """u, b and shifts are 0 at the start: relu would have no gradient there, and nothing would ever move."""
    model = fresh("gpt2")
    editor = ke.MEND.new(model, [1, 3], rank=5)
    norms = EditorTraining(model, editor, PARAMS).step(EDIT, OUTER, LOC)["norms"]
    assert all(norms[name] > 0 for name in norms if name.endswith((".u", ".bias", "mode_shift.weight")))


def test_statistics_are_counted_in_training_alone() -> None:
    model = fresh("gpt2")
    editor = ke.MEND.new(model, [1, 3], rank=5)
    training = EditorTraining(model, editor, PARAMS)
    training.step(EDIT, OUTER, LOC)
    counted = {name: x.clone() for name, x in editor.tensors.items() if name.endswith((".k", "_mean", "_std"))}
    assert all(x.isfinite().all() for x in counted.values())
    training.validate([(EDIT, OUTER, LOC)])
    ke.mend(model, ke.EditRequest("w5 {} w9", "w3", "w20"), editor)
    assert all(torch.equal(editor.tensors[name], x) for name, x in counted.items())
    training.step(EDIT, OUTER, LOC)
    assert all(float(editor.tensors[name]) == 2 * float(x) for name, x in counted.items() if name.endswith(".k"))


def test_lower_layers_are_computed_once(monkeypatch) -> None:
    model = fresh("llama")
    editor = efk_editor(model, layers=(3,))
    training, calls = EditorTraining(model, editor, PARAMS), []
    handle = model.modules.layers[2].register_forward_hook(lambda m, a, out: calls.append(1))
    first = training.step(EDIT, OUTER, LOC)
    computed = len(calls)
    second = training.step(EDIT, OUTER, LOC)
    assert computed and len(calls) == computed
    assert first["loss/edit"] == second["loss/edit"] and first["loss/loc"] == second["loss/loc"]
    monkeypatch.setattr(frozen_module, "KEPT_BYTES", 0)  # what does not fit is computed again
    small = EditorTraining(model, efk_editor(model, layers=(3,)), PARAMS)
    assert small.step(EDIT, OUTER, LOC)["loss/loc"] == pytest.approx(first["loss/loc"], rel=1e-5)
    handle.remove()


def test_a_loss_that_is_no_number_stops(monkeypatch) -> None:
    model = fresh("gpt2")
    editor = mend_editor(model)
    training = EditorTraining(model, editor, PARAMS)
    with torch.no_grad():
        editor.network.edit_lrs.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="the loss of iteration 0 is nan"):
        training.step(EDIT, OUTER, LOC)


def test_one_row_is_nothing_to_normalise_by() -> None:
    model = fresh("gpt2")
    training = EditorTraining(model, ke.MEND.new(model, [3], rank=3), PARAMS)
    with pytest.raises(ValueError, match="MEND has seen 1 of a gradient's rows, and two are the least"):
        training.step([Text.of_last([5, 3, 7], 1)], OUTER, LOC)


# -- whole trainings ---------------------------------------------------------------------------------------------------

RECORDS = [
    {
        "requested_rewrite": {
            "prompt": "{} w9 w10",
            "subject": f"w{20 + n}",
            "target_new": {"str": f"w{40 + n % 5} w{50 + n % 3}"},
            "target_true": {"str": "w30"},
        },
        "paraphrase_prompts": [f"w11 w{20 + n}", f"w12 w13 w{20 + n}"],
    }
    for n in range(12)
]
TEXTS = [f"w{n} w{n + 1} w{n + 2} w{n + 3}" for n in range(5, 25)]
BRIEF = ke.EditorTrainingParams(iterations=12, val_interval=4, val_edits=3, accumulate_bs=2, lr=1e-3, lr_lr=1e-3)


def run(kind: str, out, params=BRIEF, compat=None, records=RECORDS):
    model = fresh("gpt2")
    editor = ke.MEND.new(model, [2, 3], rank=4) if kind == "mend" else ke.EFK.new(model, [3], hidden=5, condition=6)
    return ke.train_editor(model, editor, records, TEXTS, params, out, compat)


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("kind", MAKE)
def test_killed_and_gone_on_with(kind: str, compat, tmp_path, monkeypatch) -> None:
    """Wherever a run is ended, the next one comes to what a whole run comes to."""
    whole = run(kind, tmp_path / "whole", compat=compat).tensors
    rows = json.loads((tmp_path / "whole" / "validation.json").read_text())
    assert [row["iteration"] for row in rows] == [0, 4, 8, 12]
    steps = EditorTraining.steps
    for last in (3, 5, 11):

        def ended(self, batches, last=last):
            if self.iteration <= last < self.iteration + len(batches):
                raise KeyboardInterrupt
            return steps(self, batches)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(EditorTraining, "steps", ended)
            run(kind, tmp_path / f"ended{last}", compat=compat)
        resumed = run(kind, tmp_path / f"ended{last}", compat=compat).tensors
        for name, x in whole.items():
            assert torch.allclose(resumed[name], x, rtol=1e-3, atol=1e-5), name


def test_a_finished_run_is_read_and_can_be_made_longer(tmp_path, monkeypatch) -> None:
    first = run("mend", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(EditorTraining, "steps", lambda *given: pytest.fail("there is nothing left to do"))
        again = run("mend", tmp_path)
    assert all(torch.equal(x, again.tensors[name]) for name, x in first.tensors.items())
    run("mend", tmp_path, replace(BRIEF, iterations=16))
    assert [r["iteration"] for r in json.loads((tmp_path / "validation.json").read_text())] == [0, 4, 8, 12, 16]
    loaded = ke.MEND.load(tmp_path / "editor.safetensors", fresh("gpt2"))
    assert loaded.layers == [2, 3]
    with pytest.raises(ValueError, match="other settings .*params.lr"):
        run("mend", tmp_path, replace(BRIEF, lr=2e-3))
    with pytest.raises(ValueError, match="other settings .*other data"):
        run("mend", tmp_path, records=RECORDS[1:])


def test_stops_where_nothing_gets_better(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(EditorTraining, "validate", lambda *_: torch.ones(3, 2, dtype=torch.float64))
    run("efk", tmp_path, replace(BRIEF, iterations=100, early_stop_patience=8))
    assert [r["iteration"] for r in json.loads((tmp_path / "validation.json").read_text())] == [0, 4, 8]


def test_not_a_number_keeps_the_last_good_state(tmp_path, monkeypatch) -> None:
    steps = EditorTraining.steps

    def poisoned(self, batches):
        if self.iteration <= 6 < self.iteration + len(batches):
            with torch.no_grad():
                next(self.editor.network.parameters()).fill_(float("nan"))
        return steps(self, batches)

    with monkeypatch.context() as patch, pytest.raises(NotFiniteError, match="the loss of iteration"):
        patch.setattr(EditorTraining, "steps", poisoned)
        run("mend", tmp_path)
    assert run("mend", tmp_path).network.edit_lrs.isfinite().all()


def test_no_subject_is_trained_and_validated_on() -> None:
    shared = [*RECORDS[:2], RECORDS[11], *RECORDS[2:]]
    train, held = split_records(shared, 3)
    subjects = [{r["requested_rewrite"]["subject"] for r in part} for part in (train, held)]
    assert len(held) == 3 and not subjects[0] & subjects[1] and len(train) == 9
    with pytest.raises(ValueError, match="leave 0 for training"):
        split_records(RECORDS[:3], 3)
    with pytest.raises(ValueError, match="at least two"):
        read_data(fresh("gpt2"), RECORDS, ["w1"], BRIEF, None)
    for none in ("records.json", b"records", RECORDS[0]):
        with pytest.raises(ValueError, match="expected a list of records"):
            read_data(fresh("gpt2"), none, TEXTS, BRIEF, None)
    long = "w9 " * 70
    assert max(len(text.ids) for text in read_data(fresh("gpt2"), RECORDS, [long] * 12, BRIEF, None).loc_train) == 64
    with pytest.raises(ValueError, match="more than the model's 64 positions"):
        read_data(fresh("gpt2"), [{**RECORDS[0], "paraphrase_prompts": [long]}, *RECORDS[1:]], TEXTS, BRIEF, None)


def test_what_is_asked() -> None:
    model = fresh("gpt2")
    data = read_data(model, RECORDS, TEXTS, BRIEF, None)
    example = data.train[0]
    asked = {outer_of(example, random.Random(seed)) for seed in range(20)}
    assert asked == set(example.others) and len(asked) == 2
    assert all([token for _, token in text.scored] == [token for _, token in example.edit.scored] for text in asked)
    published = read_data(model, RECORDS, TEXTS, BRIEF, "reference").train[0]
    assert published.edit.ids == example.edit.ids and len(published.edit.scored) == 1
    cuts = {outer_of(published, random.Random(seed)).ids for seed in range(40)}
    assert {len(published.edit.ids) - len(ids) for ids in cuts} == set(range((len(published.edit.ids) - 1) // 2 + 1))
    assert all(published.edit.ids[-len(ids) :] == ids for ids in cuts)


def test_texts_are_learnt_by_too(tmp_path) -> None:
    """Their last tokens are what an edit should say; what is asked begins later."""
    params = replace(BRIEF, edit_tokens=2)
    data = read_data(fresh("gpt2"), TEXTS, TEXTS, params, None)
    ids = fresh("gpt2").tokenizer(TEXTS[0]).input_ids
    assert data.train[0].edit == Text.of_last(ids, 2) and len(data.train) == len(TEXTS) - 3
    asked = {outer_of(data.train[0], random.Random(seed)) for seed in range(20)}
    assert {text.ids for text in asked} == {tuple(ids), tuple(ids[1:])}
    assert all(len(text.scored) == 2 for text in asked)
    assert len(read_data(fresh("gpt2"), TEXTS, TEXTS, BRIEF, None).train[0].edit.scored) == len(ids) - 1
    assert len(split_records(["w1 w2", *TEXTS[:4], "w1 w2"], 2)[0]) == 3  # the same text is not on both sides
    with pytest.raises(ValueError, match="'w1' has 1 tokens: an edit needs two"):
        read_data(fresh("gpt2"), ["w1", *TEXTS], TEXTS, BRIEF, None)
    assert run("mend", tmp_path, params, records=TEXTS).network.edit_lrs.isfinite().all()


def test_batches_are_read_as_texts() -> None:
    batch = {
        "input_ids": np.array([[5, 6, 7, 0], [1, 2, 3, 4]]),
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "labels": torch.tensor([[-100, -100, 7, -100], [1, 2, 3, 4]]),
    }
    first, second = texts_of(batch)
    assert first == Text((5, 6, 7), (-100, -100, 7)) and first.scored == [(1, 7)]
    assert second.scored == [(0, 2), (1, 3), (2, 4)] and second.run == (1, 2, 3)
    training = EditorTraining(fresh("gpt2"), efk_editor(fresh("gpt2")), PARAMS)
    for labels in ((-100, -100, -100), (5, -100, -100)):
        with pytest.raises(ValueError, match="no token of a text of 3 is scored"):
            training.step(EDIT, [Text((5, 6, 7), labels)], LOC)
    for empty in (([], OUTER, LOC), (EDIT, [], LOC), (EDIT, OUTER, [])):
        with pytest.raises(ValueError, match="at least one text each"):
            training.step(*empty)


@pytest.mark.parametrize(
    "name, value", [("lr", 0), ("accumulate_bs", 0), ("grad_clip", -1), ("cedit", -0.1), ("seed", -1)]
)
def test_parameters(name: str, value) -> None:
    with pytest.raises(ValueError, match=name):
        ke.EditorTrainingParams(**{name: value})
    with pytest.raises(ValueError, match="unknown keys lrs; known: lr, "):
        ke.EditorTrainingParams.from_dict({"lrs": 1})
