"""CounterFact and its flat form: what loads, and how a bad record is named."""

from __future__ import annotations

import copy
import json

import pytest

from knowedit_ext.datasets import BadRecord, Records, load_counterfact
from knowedit_ext.world import load_world

FLAT_FILES = {"counterfact-edit.json": 10_000, "counterfact-train.json": 10_000, "counterfact-val.json": 1_919}


def record(case_id=0, **changes):
    return {
        "case_id": case_id,
        "pararel_idx": 7,
        "requested_rewrite": {
            "prompt": "{} plays the",
            "relation_id": "P1303",
            "target_new": {"str": "drums", "id": "Q1"},
            "target_true": {"str": "trumpet", "id": "Q2"},
            "subject": "Miles Davis",
        },
        "paraphrase_prompts": ["It rained. Miles Davis performs on the"],
        "neighborhood_prompts": ["Chet Baker plays the", "The instrument of Dizzy Gillespie is the"],
        "attribute_prompts": [],
        "generation_prompts": ["Miles Davis is known for"],
        **changes,
    }


def flat(case_id=0, **changes):
    return {
        "case_id": case_id,
        "prompt": "On stage Miles Davis plays the",
        "target_new": "drums",
        "subject": "Miles Davis",
        "ground_truth": "trumpet",
        "rephrase_prompt": "Miles Davis is known for",
        "locality_prompt": "John Coltrane plays the",
        "locality_ground_truth": "saxophone",
        **changes,
    }


def changed(path, value):
    """A record with one value inside it replaced; `...` takes the key out."""
    altered = copy.deepcopy(record())
    *way, last = path
    inside = altered
    for key in way:
        inside = inside[key]
    if value is ...:
        del inside[last]
    else:
        inside[last] = value
    return altered


def test_records_are_kept_as_they_are(tmp_path):
    records = [record(3), record(1, extra={"kept": [1]})]
    file = tmp_path / "counterfact.json"
    file.write_text(json.dumps(records))
    for source in (file, str(file), records, iter(records)):
        loaded = load_counterfact(source)
        assert isinstance(loaded, Records) and loaded == records and loaded.bad == []


def test_the_lists_and_ids_that_may_be_absent():
    poor = record()
    for key in ("attribute_prompts", "generation_prompts", "paraphrase_prompts", "neighborhood_prompts"):
        assert load_counterfact([record(**{key: []})]) == [record(**{key: []})]
        del poor[key]
    rewrite = poor["requested_rewrite"]
    del rewrite["relation_id"], rewrite["target_new"]["id"]
    rewrite["target_true"]["id"] = None
    assert load_counterfact([poor]) == [poor]


def test_flat_records_of_one_prompt():
    for lacking in (
        {"rephrase_prompt"},
        {"locality_prompt", "locality_ground_truth"},
        {"rephrase_prompt", "locality_prompt"},
    ):
        for values in (
            {k: v for k, v in flat().items() if k not in lacking},
            flat() | dict.fromkeys(lacking & {"rephrase_prompt", "locality_prompt"}),
        ):
            (loaded,) = load_counterfact([values])
            assert loaded["paraphrase_prompts"] == (
                [] if "rephrase_prompt" in lacking else ["Miles Davis is known for"]
            )
            assert loaded["neighborhood_prompts"] == (
                [] if "locality_prompt" in lacking else ["John Coltrane plays the"]
            )
            assert "rephrase_prompt" not in loaded


def test_flat_records_become_counterfacts():
    records = load_counterfact([flat(5, note="kept"), record(6)])
    assert records[0] == {
        "case_id": 5,
        "note": "kept",
        "locality_ground_truth": "saxophone",
        "requested_rewrite": {
            "prompt": "On stage {} plays the",
            "relation_id": None,
            "target_new": {"str": "drums", "id": None},
            "target_true": {"str": "trumpet", "id": None},
            "subject": "Miles Davis",
        },
        "paraphrase_prompts": ["Miles Davis is known for"],
        "neighborhood_prompts": ["John Coltrane plays the"],
        "attribute_prompts": [],
        "generation_prompts": [],
    }
    assert records[1] == record(6)
    assert load_counterfact(records) == records


REWRITE = "requested_rewrite"
BAD = [
    (("case_id",), ..., "case_id", "is missing"),
    (("case_id",), "../7", "case_id", "cannot name a file"),
    (("case_id",), 7.5, "case_id", "expected a number or text"),
    (("case_id",), True, "case_id", "expected a number"),
    ((REWRITE,), ..., REWRITE, "is missing"),
    ((REWRITE,), ["x"], REWRITE, "expected an object"),
    ((REWRITE, "prompt"), ..., f"{REWRITE}.prompt", "is missing"),
    ((REWRITE, "prompt"), 3, f"{REWRITE}.prompt", "expected text"),
    ((REWRITE, "prompt"), "Miles plays the", f"{REWRITE}.prompt", "with no '{}'"),
    ((REWRITE, "prompt"), "{} and {} play the", f"{REWRITE}.prompt", "with 2 '{}'"),
    ((REWRITE, "subject"), " ", f"{REWRITE}.subject", "is empty"),
    ((REWRITE, "relation_id"), 19, f"{REWRITE}.relation_id", "expected text"),
    ((REWRITE, "target_new"), "drums", f"{REWRITE}.target_new", "expected an object"),
    ((REWRITE, "target_new", "str"), "", f"{REWRITE}.target_new.str", "is empty"),
    ((REWRITE, "target_new", "str"), " trumpet", f"{REWRITE}.target_new.str", "nothing to edit"),
    ((REWRITE, "target_true", "str"), ..., f"{REWRITE}.target_true.str", "is missing"),
    ((REWRITE, "target_true", "id"), 4, f"{REWRITE}.target_true.id", "expected text"),
    (("paraphrase_prompts",), None, "paraphrase_prompts", "expected a list"),
    (("paraphrase_prompts",), "Miles plays the", "paraphrase_prompts", "expected a list"),
    (("neighborhood_prompts", 1), None, "neighborhood_prompts[1]", "expected text"),
    (("neighborhood_prompts", 0), "", "neighborhood_prompts[0]", "is empty"),
    (("generation_prompts",), None, "generation_prompts", "expected a list"),
    (("generation_prompts", 0), 1.5, "generation_prompts[0]", "expected text"),
    (("attribute_prompts",), {"a": 1}, "attribute_prompts", "expected a list"),
    (("reversal_prompts",), ["x"], "reversal_prompts[0]", "expected an object"),
    (("same_subject_prompts",), [{"prompt": "x"}], "same_subject_prompts[0].target", "is missing"),
]


@pytest.mark.parametrize("path, value, key, reason", BAD)
def test_a_bad_record_is_named(path, value, key, reason):
    records = [record(10), changed(path, value), record(12)]
    with pytest.raises(ValueError, match="the records given: 1 bad record\n  record 1") as error:
        load_counterfact(records)
    assert f"'{key}' " in str(error.value) and reason in str(error.value)
    kept = load_counterfact(records, skip_bad=True)
    assert kept == [record(10), record(12)]
    assert [(bad.index, bad.key) for bad in kept.bad] == [(1, key)] and reason in kept.bad[0].reason
    assert kept.bad[0].case_id == (None if key == "case_id" else 0)


FLAT_BAD = [
    ("prompt", "Davis plays the", "prompt", "subject 'Miles Davis' does not occur"),
    ("prompt", "Miles Davis, that is Miles Davis, plays the", "prompt", "subject 'Miles Davis' occurs 2 times"),
    ("ground_truth", ..., "ground_truth", "is missing"),
    ("ground_truth", "drums", "target_new", "nothing to edit"),
    ("locality_prompt", "", "locality_prompt", "is empty"),
    ("rephrase_prompt", ["x"], "rephrase_prompt", "expected text"),
    ("locality_ground_truth", None, "locality_ground_truth", "expected text"),
]


@pytest.mark.parametrize("key, value, named, reason", FLAT_BAD)
def test_a_bad_flat_record_is_named_by_its_own_keys(key, value, named, reason):
    broken = flat(4, **{key: value})
    if value is ...:
        del broken[key]
    records = load_counterfact([flat(3), broken], skip_bad=True)
    assert len(records) == 1 and records.bad[0][:3] == (1, 4, named) and reason in records.bad[0].reason


def test_duplicate_case_ids_name_both_records():
    with pytest.raises(ValueError, match=r"record 2 \(case_id 8\): 'case_id' is the same as that of record 0"):
        load_counterfact([record(8), record(9), record(8)])


def test_case_ids_that_name_one_file():
    assert [r["case_id"] for r in load_counterfact([record("a-1"), record(1)])] == ["a-1", 1]
    with pytest.raises(ValueError, match="'case_id' is the same as that of record 0"):
        load_counterfact([record("8"), record(8)])


@pytest.mark.parametrize("name", ["records.jsonl", "records.NDJSON", "records.json"])
def test_json_lines_and_a_bom(name, tmp_path):
    records = [record(1), record(2, note="ä\u2028")]
    lines = [json.dumps(each, ensure_ascii=False) for each in records]
    file = tmp_path / name
    file.write_text("\n".join(["", lines[0], " ", lines[1]]), encoding="utf-8-sig")
    assert load_counterfact(file) == records
    file.write_text("\n".join([*lines, '{"case_id": 3,']))
    with pytest.raises(ValueError, match=f"{name}' is not JSON lines: line 3: "):
        load_counterfact(file)
    (tmp_path / "whole.json").write_text(json.dumps(records), encoding="utf-8-sig")
    assert load_counterfact(tmp_path / "whole.json") == records


def test_many_bad_records_are_counted():
    records = [record(n, paraphrase_prompts=[""]) for n in range(9)]
    with pytest.raises(ValueError, match="9 bad records") as error:
        load_counterfact([record(100), *records])
    lines = str(error.value).splitlines()
    assert len(lines) == 7 and lines[-1].strip() == "... and 4 more" and lines[5].strip().startswith("record 5 ")


def test_what_is_skipped_is_logged(caplog):
    records = load_counterfact([7, record(1)], skip_bad=True)
    assert records.bad == [BadRecord(0, None, "", "is a int, expected an object")]
    assert "record 0: is a int" in caplog.text


def test_nothing_to_load(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        load_counterfact([])
    with pytest.raises(ValueError, match="1 bad record"):
        load_counterfact([{}], skip_bad=True)
    file = tmp_path / "broken.json"
    file.write_text('[{"case_id": 1,')
    with pytest.raises(ValueError, match=r"broken.json' is not JSON"):
        load_counterfact(file)
    file.write_text('{"case_id": 1}')
    with pytest.raises(ValueError, match=r"broken.json' holds a dict"):
        load_counterfact(file)


def test_limit_looks_at_the_first_records_only():
    records = [record(0), record(1), {"bad": 1}]
    assert load_counterfact(records, limit=2) == records[:2]
    assert len(load_counterfact(records[:2], limit=9)) == 2
    for limit in (0, -1):
        with pytest.raises(ValueError, match="limit is"):
            load_counterfact(records, limit=limit)


def test_real_records(data_dir):
    records = load_counterfact(data_dir / "counterfact_350.json")
    assert len(records) == 350 and records.bad == []
    assert records == json.loads((data_dir / "counterfact_350.json").read_text())


def test_real_flat_records_are_the_original_ones(data_dir):
    original = {r["case_id"]: r for r in load_counterfact(data_dir / "counterfact_350.json")}
    met, case_ids = 0, set()
    for name, count in FLAT_FILES.items():
        records = load_counterfact(data_dir / name)
        assert len(records) == count and records.bad == []
        case_ids |= {r["case_id"] for r in records}
        for r in records:
            if r["case_id"] in original:
                met += 1
                other = original[r["case_id"]]
                mine, theirs = r["requested_rewrite"], other["requested_rewrite"]
                assert (mine["prompt"], mine["subject"]) == (theirs["prompt"], theirs["subject"])
                assert all(mine[key]["str"] == theirs[key]["str"] for key in ("target_new", "target_true"))
                assert r["neighborhood_prompts"][0] in other["neighborhood_prompts"]
                assert r["locality_ground_truth"] == mine["target_true"]["str"]
    assert met == 350 and len(case_ids) == 21_919


def test_the_world_exports_counterfacts_schema():
    records = load_world().records()
    assert load_counterfact(records) == records
