"""`evaluate` on the built-in world: the published loop, edits of all shapes, resumption, shards, bad records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.datasets import load_counterfact, load_snippets
from knowedit_ext.editing.edit import LowRank
from knowedit_ext.evaluation.nll import Question, score
from knowedit_ext.model.facts import encode
from knowedit_ext.world import load_world

from ..support.processes import finish, fork, hashes, kill_at
from ..support.unchanged import assert_unchanged, snapshot

SORTS = ("rewrite_prompts", "paraphrase_prompts", "neighborhood_prompts")
SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
import knowedit_ext as ke
from knowedit_ext.world import load_world
from knowedit_ext.datasets import load_snippets
world = load_world()
model = ke.load_model(world.folder, dtype="float32")
print("loaded", flush=True)
snippets = load_snippets(world.snippets())
ke.evaluate(model, world.records()[:6], snippets=snippets, max_length=24, out=sys.argv[1], group=2)
"""


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return ke.load_model(load_world().folder, dtype="float32")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return load_world().records()


def rank_one(model: ke.EditableModel, layer: int, seed: int, size: float = 0.15) -> ke.Edit:
    draw = torch.Generator().manual_seed(seed)
    wide, out = model.modules.down_projection(layer).weight.shape
    change = LowRank(torch.randn(wide, 1, generator=draw) * size, torch.randn(out, 1, generator=draw) * size, True)
    return ke.Edit({f"{model.modules.parameter_name(layer)}.weight": change}, "random", [{}])


def dense(model: ke.EditableModel, seed: int) -> ke.Edit:
    name = f"{model.modules.parameter_name(3)}.bias"
    draw = torch.Generator().manual_seed(seed)
    return ke.Edit({name: torch.randn(model.hidden_size, generator=draw) * 0.2}, "random", [{}])


@torch.no_grad()
def published(model: ke.EditableModel, record: dict) -> dict:
    """One record as published: every prompt with both targets, one padded batch, scores read off the full logits."""
    rewrite = record["requested_rewrite"]
    targets = [" " + rewrite[name]["str"] for name in ("target_new", "target_true")]
    sorts = {"rewrite_prompts": [rewrite["prompt"].replace("{}", rewrite["subject"])]}
    sorts |= {sort: record[sort] for sort in SORTS[1:]}
    prompts = [prompt for texts in sorts.values() for prompt in texts]
    rows = [encode(model, prompt + target)[0] for prompt in prompts for target in targets]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logp = model.hf(ids, attention_mask=mask).logits.log_softmax(-1)
    nll, right = [], []
    for n, row in enumerate(rows):
        places = range(len(encode(model, prompts[n // 2])[0]), len(row))
        nll.append(-sum(float(logp[n, t - 1, row[t]]) for t in places) / len(places))
        right.append(all(int(logp[n, t - 1].argmax()) == row[t] for t in places))
    scores, at = {}, 0
    for sort, texts in sorts.items():
        wanted = 1 if sort == "neighborhood_prompts" else 0
        pairs = range(at, at + len(texts))
        scores[f"{sort}_probs"] = [{"target_new": nll[2 * n], "target_true": nll[2 * n + 1]} for n in pairs]
        scores[f"{sort}_correct"] = [right[2 * n + wanted] for n in pairs]
        at += len(texts)
    return scores


def assert_same(got: dict, want: dict, tolerance: float = 1e-5) -> None:
    for sort in SORTS:
        pairs = zip(got[f"{sort}_probs"], want[f"{sort}_probs"], strict=True)
        for mine, theirs in pairs:
            assert mine == pytest.approx(theirs, rel=2e-6, abs=tolerance)
        assert got[f"{sort}_correct"] == want[f"{sort}_correct"]


def test_cases_equal_the_published_loop(model: ke.EditableModel, records: list[dict]) -> None:
    before = snapshot(model.hf)
    edit = ke.Edit.merge([rank_one(model, 2, 0), rank_one(model, 3, 1)])
    report = ke.evaluate(model, records[:8], edit, generation=False)
    assert_unchanged(before, model.hf)
    for case, record in zip(report.cases, records, strict=False):
        assert_same(case["pre"], published(model, record))
        assert case["case_id"] == record["case_id"] and case["requested_rewrite"] == record["requested_rewrite"]
        assert case["num_edits"] == 2 and case["grouped_case_ids"] == [r["case_id"] for r in records[:8]]
    with edit.applied(model):
        for case, record in zip(report.cases, records, strict=False):
            assert_same(case["post"], published(model, record))


def test_every_record_under_its_own_edit(model: ke.EditableModel, records: list[dict]) -> None:
    edits = [rank_one(model, 2 + n % 2, n) for n in range(5)]
    report = ke.evaluate(model, records[:5], edits, generation=False, group=3)
    for case, record, edit in zip(report.cases, records, edits, strict=False):
        assert_same(case["pre"], published(model, record))
        with edit.applied(model):
            assert_same(case["post"], published(model, record))
        assert case["num_edits"] == 1 and case["grouped_case_ids"] == [record["case_id"]]


def test_dense_edits_go_one_by_one(model: ke.EditableModel, records: list[dict]) -> None:
    edits = [dense(model, 0), rank_one(model, 2, 1), dense(model, 2)]
    report = ke.evaluate(model, records[:3], edits, generation=False, baseline=False)
    for case, record, edit in zip(report.cases, records, edits, strict=False):
        assert "pre" not in case
        with edit.applied(model):
            assert_same(case["post"], published(model, record))


def test_edits_made_group_by_group(model: ke.EditableModel, records: list[dict], tmp_path: Path) -> None:
    made = []

    class Method:
        together = False

        def describe(self) -> dict:
            return {"method": "random"}

        def __call__(self, records: list[dict]) -> list[ke.Edit]:
            made.append([record["case_id"] for record in records])
            return [rank_one(model, 2, record["case_id"]) for record in records]

    want = ke.evaluate(model, records[:5], [rank_one(model, 2, r["case_id"]) for r in records[:5]], False, group=2)
    got = ke.evaluate(model, records[:5], Method(), False, group=2, out=tmp_path)
    assert [len(ids) for ids in made] == [2, 2, 1]
    for mine, theirs in zip(got.cases, want.cases, strict=True):
        assert mine["post"] == theirs["post"]
    ke.evaluate(model, records[:5], Method(), False, group=2, out=tmp_path)
    assert len(made) == 3  # nothing is computed again


def test_extras_are_asked_where_a_record_has_them(model: ke.EditableModel, records: list[dict]) -> None:
    report = ke.evaluate(model, records[:3], generation=False)
    for case, record in zip(report.cases, records, strict=False):
        for sort in ("same_subject_prompts", "reversal_prompts"):
            asked = [Question(x["prompt"], (" " + x["target"],)) for x in record[sort]]
            scores, _ = score(model, asked)
            assert case["pre"][f"{sort}_probs"] == [{"target": pytest.approx(x.nll, abs=1e-5)} for [x] in scores]
            assert case["pre"][f"{sort}_correct"] == [sum(x.right) / len(x.right) for [x] in scores]
    row = report.summary("pre")
    assert row["same subject"].mean > 95 and 0 <= row["reversal"].mean <= 100


def test_generation_does_not_depend_on_groups_or_order(model: ke.EditableModel, records: list[dict]) -> None:
    world = load_world()
    settings = dict(snippets=load_snippets(world.snippets()), max_length=20)
    edits = [rank_one(model, 3, n) for n in range(5)]
    one = ke.evaluate(model, records[:5], edits, group=5, **settings)
    other = ke.evaluate(model, records[4::-1], edits[::-1], group=2, **settings)
    for a, b in zip(one.cases, other.cases[::-1], strict=True):
        for when in ("pre", "post"):
            assert a[when]["text"] == b[when]["text"]
            assert a[when]["reference_score"] == b[when]["reference_score"]
            assert a[when]["ngram_entropy"] == b[when]["ngram_entropy"]
            assert_same(a[when], b[when], 1e-4)
    with edits[2].applied(model):
        alone = ke.evaluate(model, [records[2]], **settings).cases[0]["pre"]
    assert alone["text"] == one.cases[2]["post"]["text"] != one.cases[2]["pre"]["text"]
    assert {"S", "GE", "RS"} <= set(one.summary())


def test_attribute_prompts(model: ke.EditableModel, records: list[dict]) -> None:
    with_attributes = [r for r in records if r["attribute_prompts"]][:2]
    report = ke.evaluate(model, with_attributes, generation=False, attributes=True)
    for case, record in zip(report.cases, with_attributes, strict=True):
        assert len(case["pre"]["attribute_prompts_probs"]) == len(record["attribute_prompts"])
        assert all(case["pre"]["attribute_prompts_correct"])  # others who have the new object, all known


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(fork(SCRIPT, out))
    return out


def test_killed_and_resumed_reports_the_same(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for files in (0, 3):  # kill -9 when so many cases are there
        kill_at(fork(SCRIPT, out), out, "cases/*.json", files)
    finish(fork(SCRIPT, out))
    assert hashes(out) == hashes(whole)


def test_two_ranks_report_the_same(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finish(fork(SCRIPT, out, ranks=2))
    assert hashes(out) == hashes(whole)


def test_a_folder_is_in_the_published_layout(whole: Path) -> None:
    files = sorted(whole.glob("cases/*case_*.json"), key=lambda x: int(str(x).split("_")[-1].split(".")[0]))
    assert [file.name for file in files] == [f"0_edits-case_{n}.json" for n in range(6)]
    case = json.loads(files[0].read_text())
    assert {"case_id", "grouped_case_ids", "num_edits", "requested_rewrite", "pre"} <= set(case)
    assert {"ngram_entropy", "reference_score", "text"} <= set(case["pre"])
    assert {p.name for p in whole.iterdir()} == {"cases", "settings.json", "report.json", "report.md", "relations.png"}
    assert ke.Report.load(whole).summary("pre")["GE"].n == 6


def test_other_settings_are_refused(model: ke.EditableModel, records: list[dict], tmp_path: Path) -> None:
    ke.evaluate(model, records[:2], rank_one(model, 2, 0), generation=False, out=tmp_path)
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match="other settings.*edit"):
        ke.evaluate(model, records[:2], rank_one(model, 2, 1), generation=False, out=tmp_path)
    assert hashes(tmp_path) == before


def test_other_data_under_the_same_ids_is_refused(model: ke.EditableModel, records: list[dict], tmp_path: Path) -> None:
    settings = dict(generation=False, out=tmp_path)
    ke.evaluate(model, records[:2], **settings)
    swapped = json.loads(json.dumps(records[:2]))
    for record in swapped:
        rewrite = record["requested_rewrite"]
        rewrite["target_new"], rewrite["target_true"] = rewrite["target_true"], rewrite["target_new"]
    with pytest.raises(ValueError, match="other settings.*records"):
        ke.evaluate(model, swapped, **settings)
    with rank_one(model, 2, 0).applied(model), pytest.raises(ValueError, match="other settings.*model"):
        ke.evaluate(model, records[:2], **settings)


def test_facts_edited_together_are_part_of_the_settings(
    model: ke.EditableModel, records: list[dict], tmp_path: Path
) -> None:
    class Together:
        together = True

        def describe(self) -> dict:
            return {"method": "random"}

        def __call__(self, records: list[dict]) -> ke.Edit:
            return ke.Edit.merge([rank_one(model, 2, record["case_id"]) for record in records])

    report = ke.evaluate(model, records[:4], Together(), False, group=2, out=tmp_path)
    assert [case["grouped_case_ids"] for case in report.cases] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(case["num_edits"] == 2 and case["time"] > 0 for case in report.cases)
    with pytest.raises(ValueError, match="other settings.*group: 2 there, 3 asked"):
        ke.evaluate(model, records[:4], Together(), False, group=3, out=tmp_path)


def test_records_without_prompts_of_a_sort(model: ke.EditableModel, records: list[dict]) -> None:
    """The columns that can be had, over the records that have them, and how many have not."""
    poor = [records[0], {**records[1], "neighborhood_prompts": []}, {**records[2], "case_id": "two"}]
    del poor[2]["paraphrase_prompts"]
    report, whole = (ke.evaluate(model, r, generation=False) for r in (poor, records[:3]))
    row = report.summary("pre")
    assert {name: row[name].n for name in ("ES", "PS", "NS", "S")} == {"ES": 3, "PS": 2, "NS": 2, "S": 1}
    assert "1 record without paraphrase_prompts: PS, PM and PA are of the others." in report.table()
    assert "1 record without neighborhood_prompts: NS, NM and NA are of the others." in report.table()
    assert [case["pre"]["rewrite_prompts_probs"] for case in report.cases] == [
        case["pre"]["rewrite_prompts_probs"] for case in whole.cases
    ]
    assert "without" not in whole.table()
    bare = [{k: v for k, v in r.items() if k in ("case_id", "requested_rewrite")} for r in records[:2]]
    report = ke.evaluate(model, bare, generation=False)
    assert set(report.summary("pre")) == {"ES", "EM", "EA"} and "2 records without" in report.table()
    assert "PS, PM and PA are empty." in report.table()


# -- bad input --------------------------------------------------------------------------------------------------------


def bad_records(records: list[dict]) -> list[dict]:
    empty = {**records[1], "neighborhood_prompts": [""]}
    lengthy = {**records[2], "paraphrase_prompts": [" ".join(["Who"] * 500)]}
    return [records[0], empty, lengthy, records[0], records[3]]


def test_bad_records_are_named(model: ke.EditableModel, records: list[dict]) -> None:
    with pytest.raises(ValueError) as error:
        ke.evaluate(model, bad_records(records), generation=False)
    assert "record 1 (case_id 1): 'neighborhood_prompts[0]' is empty" in str(error.value)
    assert "record 3 (case_id 0): 'case_id' is the same as that of record 0" in str(error.value)
    with pytest.raises(ValueError, match=r"record 1 \(case_id 2\): 'prompts' prompt 'Who Who.*positions"):
        ke.evaluate(model, [records[0], bad_records(records)[2]], generation=False)


def test_bad_records_are_skipped_only_when_asked(model: ke.EditableModel, records: list[dict], tmp_path: Path) -> None:
    edits = [rank_one(model, 2, n) for n in range(5)]
    report = ke.evaluate(model, bad_records(records), edits, generation=False, skip_bad=True, out=tmp_path)
    assert [case["case_id"] for case in report.cases] == [0, 3]
    assert [(bad["index"], bad["case_id"]) for bad in report.skipped] == [(1, 1), (2, 2), (3, 0)]
    assert "3 records skipped" in (tmp_path / "report.md").read_text()
    alone = ke.evaluate(model, [records[3]], edits[4], generation=False)
    assert_same(report.cases[1]["post"], alone.cases[0]["post"])  # an edit stays with its record
    assert ke.Report.load(tmp_path).skipped == report.skipped


def test_times_stay_with_their_records(model: ke.EditableModel, records: list[dict]) -> None:
    settings = dict(generation=False, skip_bad=True, baseline=False)
    edits = [rank_one(model, 2, n) for n in range(5)]
    report = ke.evaluate(model, bad_records(records), edits, time=[1, 2, 3, 4, 5.5], **settings)
    assert [case["time"] for case in report.cases] == [1.0, 5.5]
    with pytest.raises(ValueError, match="2 times for 3 records: expected one time for all"):
        ke.evaluate(model, records[:3], edits[:3], time=[1, 2], **settings)


def test_the_first_of_checked_records(model: ke.EditableModel, records: list[dict]) -> None:
    checked = load_counterfact(bad_records(records), skip_bad=True)  # records 1 and 3 are left out
    report = ke.evaluate(model, checked, generation=False, limit=1)
    assert len(report.cases) == 1 and report.skipped == []
    report = ke.evaluate(model, checked, generation=False, skip_bad=True)
    assert [bad["index"] for bad in report.skipped] == [1, 2, 3] and len(report.cases) == 2


def test_a_broken_edit_is_named_and_writes_nothing(
    model: ke.EditableModel, records: list[dict], tmp_path: Path
) -> None:
    broken = rank_one(model, 2, 0, size=1e18)
    with pytest.raises(ValueError, match="not finite: the model, or its edit, is broken"):
        ke.evaluate(model, records[:2], broken, generation=False, out=tmp_path)
    assert not list(tmp_path.glob("cases/*"))


def test_edits_outside_the_layers_go_one_by_one(model: ke.EditableModel, records: list[dict]) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, outputs = torch.randn(len(model.tokenizer), 1, generator=draw), torch.randn(160, 1, generator=draw)
    edit = ke.Edit({"transformer.wte.weight": LowRank(inputs * 0.05, outputs * 0.05, True)}, "random", [{}])
    report = ke.evaluate(model, records[:2], [edit, edit], generation=False)
    with edit.applied(model):
        for case, record in zip(report.cases, records, strict=False):
            assert_same(case["post"], published(model, record))


def test_missing_snippets_are_named(model: ke.EditableModel, records: list[dict]) -> None:
    snippets = load_snippets(load_world().snippets())
    rewrite = records[1]["requested_rewrite"]
    fewer = {**snippets, rewrite["relation_id"]: {}}
    with pytest.raises(ValueError, match=f"record 1.*{rewrite['relation_id']}"):
        ke.evaluate(model, records[:2], snippets=fewer, max_length=10)
    silent = [{**records[0], "generation_prompts": []}]
    with pytest.raises(ValueError, match="generation=False"):
        ke.evaluate(model, silent)


def test_calls_that_make_no_sense(model: ke.EditableModel, records: list[dict]) -> None:
    with pytest.raises(ValueError, match="2 edits for 3 records"):
        ke.evaluate(model, records[:3], [rank_one(model, 2, 0)] * 2, generation=False)
    with pytest.raises(ValueError, match="unknown dataset 'x'"):
        ke.evaluate(model, records[:3], dataset="x")
    with pytest.raises(ValueError, match="no records"):
        ke.evaluate(model, [], generation=False)
    with pytest.raises(ValueError, match="unknown compat"):
        ke.evaluate(model, records[:1], compat="x", generation=False)


def test_records_of_the_real_data_set(model: ke.EditableModel, data_dir: Path) -> None:
    records = load_counterfact(data_dir / "counterfact_350.json", limit=3)
    report = ke.evaluate(model, records, generation=False)
    for case, record in zip(report.cases, records, strict=True):
        assert_same(case["pre"], published(model, record), 1e-4)
