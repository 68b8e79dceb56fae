"""Studies of sets of edits: each number by the public functions, gone on with, enlarged, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import knowedit_ext as ke
from knowedit_ext import studies
from knowedit_ext.studies.layers import windows_of
from knowedit_ext.studies.mixes import case_of
from knowedit_ext.studies.scaling import GRID
from knowedit_ext.world import load_world

from ..support.processes import hashes

ULTRA = "ultraedit"  # it needs more than one fact
FT = "ft-l:num_steps=3"
ROME = replace(ke.ROMEParams.preset("world"), v_num_grad_steps=3, context_template_length_params=((3, 1),))


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return ke.load_model(load_world().folder, dtype="float32")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return load_world().records()[:24]


@pytest.fixture(scope="module")
def moments(model) -> ke.Moments:
    return ke.collect_moments(model, load_world().statements()[:150], layers=list(range(6)))


def summary(model, records, edit, when="post") -> dict[str, float]:
    report = ke.evaluate(model, records, edit, generation=False)
    return {name: mean.mean for name, mean in report.summary(when).items()}


def scaling(model, records, out, methods=(ULTRA,), **more):
    return studies.scaling(model, records, list(methods), out, params="world", **({"counts": [2, 4]} | more))


def test_the_published_grid() -> None:
    assert GRID == (1, 2, 3, 6, 10, 18, 32, 56, 100, 178, 316, 562, 1000, 1778, 3162, 5623, 10000)


def test_scaling_is_one_edit_of_the_first_facts(model, records, tmp_path) -> None:
    found = scaling(model, records, tmp_path)
    assert [(row["method"], row["n"], row["facts"]) for row in found.rows] == [
        ("unedited", 4, 4),
        (ULTRA, 2, 2),
        (ULTRA, 4, 4),
    ]
    for row in found.rows[1:]:
        edit = ke.edit(model, records[: row["n"]], ULTRA, params="world")
        want = summary(model, records[: row["n"]], edit)
        assert {name: row[name] for name in want} == pytest.approx(want, abs=1e-3)
    want = summary(model, records[:4], None, "pre")
    assert {name: found.rows[0][name] for name in want} == pytest.approx(want, abs=1e-3)
    assert found.rows[2]["EM_half"] > 0
    assert not model.applied_edits
    assert {path.name for path in tmp_path.glob("*.*")} >= {"study.json", "study.csv", "study.md", "curves.png"}


def test_the_figure_has_a_panel_a_score(model, records, tmp_path) -> None:
    figure = scaling(model, records, tmp_path).figures["curves"]
    found = scaling(model, records, tmp_path)
    shown = [axes.get_ylabel() or axes.get_title() for axes in figure(found).axes if axes.get_visible()]
    assert shown == ["S", "ES", "PS", "NS"]


def test_what_a_method_refuses_is_a_note(model, records, tmp_path) -> None:
    found = scaling(model, records, tmp_path, counts=[1, 2])
    assert [row["n"] for row in found.chosen(method=ULTRA)] == [2]
    assert found.notes == [
        "ultraedit, n 1, part 0: ended after 0 edits: ValueError: one token is all that UltraEdit has "
        "seen, and nothing to normalise by: give more requests"
    ]
    assert "ended after 0 edits" in (tmp_path / "study.md").read_text()


def test_small_numbers_are_edited_in_several_batches(model, records, tmp_path) -> None:
    found = scaling(model, records, tmp_path, counts=[2], least=5)
    (row,) = found.chosen(method=ULTRA)
    assert row["facts"] == 4
    parts = [summary(model, part, ke.edit(model, part, ULTRA, params="world")) for part in (records[:2], records[2:4])]
    assert row["EM"] == pytest.approx((parts[0]["EM"] + parts[1]["EM"]) / 2, abs=1e-3)


def test_rome_edits_one_on_top_of_the_other(model, records, moments, tmp_path) -> None:
    found = studies.scaling(model, records, ["rome"], tmp_path, params=ROME, moments=moments, counts=[3])
    edits = []
    for record in records[:3]:
        for edit in edits:
            edit.apply(model)
        made = ke.rome(model, record, ROME, moments)
        for edit in reversed(edits):
            edit.revert(model)
        edits.append(made)
    want = summary(model, records[:3], ke.Edit.merge(edits))
    (row,) = found.chosen(method="rome")
    assert {name: row[name] for name in want} == pytest.approx(want, abs=1e-2)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(model, records, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    scaling(model, records, out)
    return out


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_killed_study_goes_on(model, records, whole, tmp_path, monkeypatch, at: int) -> None:
    import sys

    module, calls = sys.modules["knowedit_ext.studies.edit_sets"], []
    evaluate = module.evaluate

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", killed)
    with pytest.raises(Killed):
        scaling(model, records, tmp_path / "killed")
    assert not model.applied_edits
    monkeypatch.setattr(module, "evaluate", evaluate)
    scaling(model, records, tmp_path / "killed")
    assert hashes(tmp_path / "killed") == hashes(whole)


def test_enlarged_and_refused(model, records, tmp_path) -> None:
    scaling(model, records, tmp_path, counts=[2])
    (cell,) = tmp_path.glob("cells/ultraedit-n2-*/result.json")
    stamp = cell.stat().st_mtime_ns
    found = scaling(model, records, tmp_path, methods=(ULTRA, "ultraedit:lr=1e-4"), counts=[2, 3])
    assert len(found.rows) == 5 and cell.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="shuffle: False there, True asked"):
        scaling(model, records, tmp_path, shuffle=True)
    with pytest.raises(ValueError, match="other records"):
        scaling(model, records[5:], tmp_path)
    with pytest.raises(ValueError, match="run: 'scaling' there, 'categories' asked"):
        studies.categories(model, records, [ULTRA], tmp_path, params="world", edits=1)
    cell.write_text(json.dumps(json.loads(cell.read_text()) | {"ended": "x"}))
    with pytest.raises(ValueError, match="was altered"):
        scaling(model, records, tmp_path)


def test_what_is_damaged_is_no_result(model, records, tmp_path) -> None:
    scaling(model, records, tmp_path, counts=[2])
    (cell,) = tmp_path.glob("cells/ultraedit-n2-*")
    edit = cell / "edit_000000.safetensors"
    whole = edit.read_bytes()
    (cell / "result.json").unlink()
    edit.write_bytes(whole[:50])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        scaling(model, records, tmp_path, counts=[2])
    edit.write_bytes(whole)
    assert not scaling(model, records, tmp_path, counts=[2]).notes
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="has cells, but no settings.json"):
        scaling(model, records, tmp_path, counts=[2])


@pytest.mark.parametrize(
    "asked, error",
    [
        (dict(counts=[30]), "30 edits asked for, but there are 24"),
        (dict(methods=["memit"]), "'memit' needs moments of layer 1"),
        (dict(methods=[]), "no methods"),
        (dict(counts=[0]), "at least 1"),
    ],
)
def test_bad_input_comes_before_any_work(model, records, tmp_path, asked, error) -> None:
    with pytest.raises(ValueError, match=error):
        scaling(model, records, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_layers(model, records, tmp_path) -> None:
    found = studies.layers(
        model, records, tmp_path, method=ULTRA, params="world", windows=[(2,), (1, 2), (0, 3)], counts=[2]
    )
    labels = ["ultraedit:layers=2-2", "ultraedit:layers=1-2", "ultraedit:layers=0/3"]
    assert found.names("method") == ["unedited", *labels]
    params = replace(ke.UltraEditParams.preset("world"), layers=(0, 3))
    want = summary(model, records[:2], ke.ultraedit(model, records[:2], params))
    (row,) = found.chosen(method=labels[2])
    assert row["EM"] == pytest.approx(want["EM"], abs=1e-3)


def test_windows() -> None:
    assert windows_of((3, 4, 5, 6, 7, 8), 28) == [
        (8,),
        (6, 7, 8),
        (4, 5, 6, 7, 8),
        (2, 3, 4, 5, 6, 7, 8),
        (3, 4, 5, 6, 7, 8),
        (0, 1, 2, 3, 4, 5),
        (11, 12, 13, 14, 15, 16),
        (21, 22, 23, 24, 25, 26),
    ]


def test_categories(model, records, tmp_path) -> None:
    by_relation: dict[str, list[dict]] = {}
    for record in records:
        by_relation.setdefault(record["requested_rewrite"]["relation_id"], []).append(record)
    least = sorted(map(len, by_relation.values()))[1]
    found = studies.categories(model, records, [ULTRA], tmp_path, params="world", edits=least)
    large = sorted(name for name, facts in by_relation.items() if len(facts) >= least)
    assert found.names("relation") == large
    some = by_relation[large[0]][:least]
    want = summary(model, some, ke.edit(model, some, ULTRA, params="world"))
    (row,) = found.chosen(method=ULTRA, relation=large[0])
    assert {name: row[name] for name in want} == pytest.approx(want, abs=1e-3)
    with pytest.raises(ValueError, match="no relation has 300 records"):
        studies.categories(model, records, [ULTRA], tmp_path / "more", params="world")


def test_mixes(model, tmp_path) -> None:
    records = load_world().records()[:60]
    found = studies.mixes(model, records, [ULTRA], tmp_path, params="world", pairs=[("P19", "P103")], counts=[2])
    some = {name: [r for r in records if r["requested_rewrite"]["relation_id"] == name] for name in ("P19", "P103")}
    mixed = [some["P19"][0], some["P103"][0]]
    want = summary(model, mixed, ke.edit(model, mixed, ULTRA, params="world"))
    (mix,) = found.chosen(set="mix")
    assert mix["EM"] == pytest.approx(want["EM"], abs=1e-3) and mix["case"] == "subjects alike"
    alone = [found.chosen(set=name)[0]["EM"] for name in some]
    assert found.chosen(set="average")[0]["EM"] == pytest.approx(sum(alone) / 2)
    assert case_of("P19", "P20") == "subjects and objects alike" and case_of("P36", "P19") == "objects alike"
    with pytest.raises(ValueError, match="3 facts of P19.P103: expected an even number"):
        studies.mixes(model, records, [ULTRA], tmp_path, params="world", pairs=[("P19", "P103")], counts=[3])
    with pytest.raises(ValueError, match="no record is of relation 'P36'"):
        studies.mixes(model, records, [ULTRA], tmp_path, params="world", pairs=[("P36", "P103")])


def test_layer_and_token(model, records, moments, tmp_path) -> None:
    tokens = ["subject_last", "last"]
    found = studies.layer_token(
        model, records, tmp_path, params=ROME, moments=moments, layers=[2, 5], tokens=tokens, facts=3
    )
    assert [(row.get("token"), row.get("layer"), row["null"]) for row in found.rows] == [
        (None, None, 0),
        ("subject_last", 2, 0),
        ("subject_last", 5, 3),  # nothing lies behind the last layer, but at the last token
        ("last", 2, 0),
        ("last", 5, 0),
    ]
    params = replace(ROME, layers=(2,), fact_token="last")
    want = summary(model, records[:3], [ke.rome(model, record, params, moments) for record in records[:3]])
    (row,) = found.chosen(token="last", layer=2)
    assert {name: row[name] for name in want} == pytest.approx(want, abs=1e-2)
    unedited, null = found.rows[0], found.rows[2]
    assert null["EM"] == unedited["EM"] and null["NM"] == unedited["NM"]
    with pytest.raises(ValueError, match="does not edit single facts at a token"):
        studies.layer_token(model, records, tmp_path / "memit", method="memit", params="world", moments=moments)


@pytest.mark.parametrize(
    "name, options",
    [
        ("scaling", ["--method", ULTRA, "--counts", "2,3", "--generation"]),
        ("layers", ["--method", ULTRA, "--window", "1-2", "--window", "2", "--counts", "2"]),
        ("categories", ["--method", ULTRA, "--edits", "2", "--relation", "P19"]),
        ("mixes", ["--method", ULTRA, "--pair", "P19+P103", "--counts", "2"]),
        ("layer-token", ["--layers", "5", "--token", "subject_last", "--facts", "2"]),
        ("attention", ["--method", FT, "--facts", "2"]),
        ("reversal", ["--method", FT, "--facts", "2", "--candidates", "5"]),
        ("severed", ["--limit", "2", "--samples", "2"]),
    ],
)
def test_commands(tmp_path: Path, monkeypatch, capsys, name: str, options: list[str]) -> None:
    from knowedit_ext.cli import main

    monkeypatch.setattr("sys.argv", ["knowedit", "study", name, "world", "--out", str(tmp_path), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and "study.md" in capsys.readouterr().out
    assert studies.Findings.read(tmp_path)["rows"]
