"""The study of localization: each number by its parts, one edit at a time; resumed, enlarged, two ranks."""

from __future__ import annotations

import csv
import json
import warnings
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

import knowedit_ext as ke
from knowedit_ext.editing.problems import problem_record
from knowedit_ext.evaluation.known import known_facts
from knowedit_ext.runs.files import load_json
from knowedit_ext.studies.localization import localization_study
from knowedit_ext.studies.localization_edits import study_method
from knowedit_ext.studies.localization_results import Localization
from knowedit_ext.world import load_world

from ..support.processes import finish, fork, hashes
from ..support.unchanged import assert_unchanged, snapshot

CHOSEN = dict(
    problems=["error_injection", "fact_erasure", "fact_forcing"],
    methods=["rome", "ft-1"],
    layers=[2, 5],
    params={
        "rome": ke.ROMEParams(layers=(0,), v_num_grad_steps=4, context_template_length_params=((3, 1),)),
        "ft": ke.FTParams(layers=(0,), num_steps=3, norm_constraint=6e-3, lr=2e-3),
    },
    noise=0.3,
    samples=3,
    trace_window=3,
    group=2,
)
SCRIPT = f"""
import sys
import torch
torch.set_num_threads(1)
import knowedit_ext as ke
from knowedit_ext import FTParams, ROMEParams
from knowedit_ext.world import load_world
world = load_world()
model = ke.load_model(world.folder, dtype="float32")
print("loaded", flush=True)
moments = ke.collect_moments(model, world.statements()[:150], layers=[2, 5])
ke.localization_study(model, world.records(), sys.argv[1], moments, facts=3, **{CHOSEN!r})
"""


def world_model() -> ke.EditableModel:
    return ke.load_model(load_world().folder, dtype="float32")


def moments_of_world(model: ke.EditableModel) -> ke.Moments:
    return ke.collect_moments(model, load_world().statements()[:150], layers=[2, 5])


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return world_model()


@pytest.fixture(scope="module")
def moments(model) -> ke.Moments:
    return moments_of_world(model)


def study(model, out, moments, facts: int = 3, **changes) -> Localization:
    return localization_study(model, load_world().records(), out, moments, facts=facts, **(CHOSEN | changes))


@pytest.fixture(scope="module")
def whole(model, moments, tmp_path_factory) -> tuple[Path, Localization]:
    out = tmp_path_factory.mktemp("study") / "whole"
    before = snapshot(model.hf)
    results = study(model, out, moments)
    assert_unchanged(before, model.hf)
    return out, results


def test_facts_are_those_that_are_known(model, whole) -> None:
    known = []
    for record in load_world().records():
        rewrite = record["requested_rewrite"]
        fact = ke.Fact(rewrite["prompt"], rewrite["subject"], rewrite["target_true"]["str"])
        if known_facts(model, [fact])[0].known:
            known.append(record["case_id"])
        if len(known) == 3:
            break
    assert whole[1].names("case_id") == known


def test_every_edit_by_hand(model, moments, whole) -> None:
    """One after the other through the public functions; p from `evaluate` and the number of a target's tokens."""
    _, results = whole
    records = {record["case_id"]: record for record in load_world().records()}
    assert len(results.rows) == 3 * 3 * 2 * 2 and not results.left_out
    contexts = None
    for row in results.rows:
        record = records[row["case_id"]]
        request = ke.as_problem(model, record, row["problem"], noise=0.3)
        method = study_method(row["method"], 5, CHOSEN["params"])
        params = method.params_at(row["layer"], model.num_layers, row["problem"])
        assert params.layers == (row["layer"],)
        assert row["null"] == (row["method"] == "rome" and row["layer"] == 5)  # no subject of these ends its prompt
        edit = None
        if not row["null"]:
            contexts = contexts or method.contexts(model) if row["method"] == "rome" else contexts
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if row["method"] == "rome":
                    edit = ke.rome(model, request, params, moments, method.contexts(model))
                else:
                    edit = ke.finetune(model, [request], params)
        asked = json.loads(json.dumps(record))
        asked["requested_rewrite"]["target_new"]["str"] = request.target_new
        case = ke.evaluate(model, [asked], edit, generation=False, noise=request.noise).cases[0]
        tokens = len(model.tokenizer(request.target_new).input_ids)
        for when, side in (("before", "pre"), ("after", "post" if edit is not None else "pre")):
            for kind in ("rewrite", "paraphrase", "neighborhood"):
                p = np.exp(-case[side][f"{kind}_prompts_probs"][0]["target_new"] * tokens)
                assert row[f"{when}_{kind}"] == pytest.approx(p, rel=2e-3, abs=1e-6)
        sides = [{k: row[f"{w}_{k}"] for k in ("rewrite", "paraphrase", "neighborhood")} for w in ("before", "after")]
        scores = ke.problem_scores(row["problem"], *sides)
        assert {name: row[name] for name in scores} == pytest.approx(scores)


def test_effects_are_those_of_traces(model, whole) -> None:
    _, results = whole
    records = {record["case_id"]: record for record in load_world().records()}
    for place, case_id in enumerate(results.names("case_id")):
        rewrite = records[case_id]["requested_rewrite"]
        fact = ke.Fact(rewrite["prompt"], rewrite["subject"], rewrite["target_true"]["str"])
        want = ke.fraction_restored(ke.trace(model, fact, kind="mlp", window=3, samples=3, noise=0.3))
        assert results.effects[place] == pytest.approx(want, abs=1e-4)
        for row in results.chosen(case_id=case_id):
            assert row["effect"] == results.effects[place][row["layer"]] and row["peak"] == int(want.argmax())


def test_regressions_with_and_without_edits_that_change_nothing(whole) -> None:
    _, results = whole
    assert len(results.regressions) == 3 * 2 * 4 * 2
    for regression in results.regressions:
        rows = results.chosen(problem=regression["problem"], method=regression["method"])
        rows = [row for row in rows if regression["null"] or not row["null"]]
        assert regression["n"] == len(rows) == (3 if regression["method"] == "rome" and not regression["null"] else 6)
        score = [row[regression["metric"]] for row in rows]
        if np.ptp(score) == 0:
            assert regression["r2_layer"] is None
        else:
            want = ke.regress(score, [row["layer"] for row in rows], [row["effect"] for row in rows]).to_dict()
            assert {name: regression[name] for name in want} == want


def test_files(whole) -> None:
    out, results = whole
    table = load_json(out / "table.json")
    assert table["rows"] == json.loads(json.dumps(results.rows)) and table["settings"]["facts"] == 3
    with open(out / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["rewrite"]) for row in rows] == [row["rewrite"] for row in results.rows]
    again = Localization.load(out)
    assert again.regressions == results.regressions and again.table() == results.table()
    figures = {path.name for path in (out / "figures").iterdir()}
    names = ("effect_by_layer", "peaks", "score_against_effect", "scores_by_layer", "explained")
    assert figures == {f"{name}.{suffix}" for name in names for suffix in ("png", "pdf")}
    assert (out / "study.md").read_text() == f"{results.lead()}\n\n{results.table()}"
    assert "3 facts" in results.lead() and not list(out.glob("*.html"))
    means = results.means()
    (first,) = (m for m in means if (m["problem"], m["method"], m["layer"]) == ("fact_erasure", "ft-1", 2))
    expected = [row["rewrite"] for row in results.chosen(problem="fact_erasure", method="ft-1", layer=2)]
    assert first["rewrite"] == pytest.approx(np.mean(expected)) and first["n"] == 3


def test_gone_on_with_where_it_was(model, moments, whole, tmp_path) -> None:
    out, _ = whole
    want = hashes(out)
    results = sorted(out.glob("cells/*/result.json"))
    traces = out.glob("cells/traces-*/result.json"), out.glob("cells/traces-*/traces/cases/*_mlp.npz")
    for path in {*results[::3], *chain(*traces), out / "table.json"}:
        path.unlink()
    study(model, out, moments)
    assert hashes(out) == want


def test_enlarged_is_as_if_asked_for_at_once(model, moments, whole, tmp_path) -> None:
    study(model, tmp_path, moments, facts=1, problems=CHOSEN["problems"][:1], layers=[2])
    study(model, tmp_path, moments, methods=["rome"])
    study(model, tmp_path, moments)
    names = ("table.csv", "regressions.csv", "means.csv")
    assert [(tmp_path / name).read_text() for name in names] == [(whole[0] / name).read_text() for name in names]
    fewer = study(model, tmp_path, moments, facts=2)
    assert fewer.rows == [row for row in whole[1].rows if row["case_id"] in (0, 1)]


def test_two_ranks_give_the_same(whole, tmp_path) -> None:
    out = tmp_path / "run"
    finish(fork(SCRIPT, out, ranks=2))
    assert hashes(out) == hashes(whole[0])


def test_as_released(model, moments, tmp_path) -> None:
    """compat="hase" reaches problems, edits and the noise of their evaluation."""
    problems = ["fact_forcing", "tracing_reversal"]
    results = study(model, tmp_path, moments, facts=2, layers=[2], problems=problems, compat="hase")
    records = {record["case_id"]: record for record in load_world().records()}
    for row in results.rows:
        record = records[row["case_id"]]
        request = ke.as_problem(model, record, row["problem"], noise=0.3, compat="hase")
        method = study_method(row["method"], 5, CHOSEN["params"])
        params = method.params_at(row["layer"], model.num_layers, row["problem"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if row["method"] == "rome":
                edit = ke.rome(model, request, params, moments, method.contexts(model), compat="hase")
            else:
                edit = ke.finetune(model, [request], params, compat="hase")
        asked = problem_record(record, request)
        case = ke.evaluate(model, [asked], edit, generation=False, compat="hase").cases[0]
        for kind in ("rewrite", "paraphrase", "neighborhood"):
            prompt = record["requested_rewrite"]["prompt"].format(row["subject"])
            tokens = len(model.tokenizer(prompt + request.target_new).input_ids) - len(
                model.tokenizer(prompt).input_ids
            )
            p = np.exp(-case["post"][f"{kind}_prompts_probs"][0]["target_new"] * tokens)
            assert row[f"after_{kind}"] == pytest.approx(p, rel=5e-3, abs=1e-6)


def test_essence(model, moments, tmp_path) -> None:
    results = study(model, tmp_path, moments, facts=2, layers=[2], problems=["error_injection"], essence=True)
    for row in results.rows:
        assert row["after_essence"] > 0 and row["before_essence"] > 0
        rise = row["after_essence"] - row["before_essence"]
        assert row["essence"] == pytest.approx(1 - min(max(rise, 0), 5) / 5)
        assert row["overall_essence"] == pytest.approx((3 * row["overall"] + row["essence"]) / 4)


def test_what_a_study_cannot_be(model, moments, whole, tmp_path) -> None:
    for changes, message in [
        ({"problems": ["forcing"]}, "unknown problem 'forcing'"),
        ({"methods": ["ft"]}, "unknown method 'ft' of the study"),
        ({"methods": ["rome", "rome"]}, "expected at least one, each once"),
        ({"layers": [7]}, "layer 7 is out of range"),
        ({"layers": [3]}, "moments of layers 3 are missing"),
        ({"layers": []}, "expected at least one"),
    ]:
        with pytest.raises(ValueError, match=message):
            study(model, tmp_path / "new", moments, **changes)
    with pytest.raises(ValueError, match="noise: 0.3 there, 0.2 asked"):
        study(model, whole[0], moments, noise=0.2)
    with pytest.raises(ValueError, match="v_lr"):
        other = CHOSEN["params"] | {"rome": ke.ROMEParams(layers=(0,), v_num_grad_steps=4, v_lr=0.1)}
        study(model, whole[0], moments, params=other)


def test_published_settings() -> None:
    """In google/belief-localization's table."""
    at = {name: study_method(name, 5, None) for name in ("ft-1", "ft-5", "rome", "memit")}
    bounds = {
        "error_injection": (1e-4, 5e-5),
        "tracing_reversal": (1e-3, 1e-3),
        "fact_erasure": (1e-5, 1e-5),
        "fact_amplification": (5e-5, 1e-5),
        "fact_forcing": (1e-4, 1e-4),
    }
    for problem, pair in bounds.items():
        forcing = problem == "fact_forcing"
        for name, bound in zip(("ft-1", "ft-5"), pair, strict=True):
            params = at[name].params_at(3, 28, problem)
            assert params.norm_constraint == pytest.approx(bound) and params.num_steps == (50 if forcing else 25)
        rome = at["rome"].params_at(3, 28, problem)
        assert (rome.v_num_grad_steps, rome.v_lr) == ((25, pytest.approx(0.05)) if forcing else (20, 0.5))
    assert at["memit"].params_at(1, 28, "fact_forcing").layers == (0, 1, 2, 3)
    assert at["ft-5"].params_at(27, 28, "fact_erasure").layers == (25, 26, 27)


def test_command(tmp_path, monkeypatch, capsys) -> None:
    from knowedit_ext.cli import main

    chosen = ["--facts", "1", "--method", "ft-1", "--problem", "fact_erasure", "--layers", "1-2", "--samples", "2"]
    monkeypatch.setattr("sys.argv", ["knowedit", "study", "localization", "world", "--out", str(tmp_path), *chosen])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and "study.md" in capsys.readouterr().out
    assert Localization.load(tmp_path).names("layer") == [1, 2]
