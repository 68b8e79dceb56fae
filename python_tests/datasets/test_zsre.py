"""zsRE: the published mapping, and how a bad record is named."""

from __future__ import annotations

import json

import pytest

from knowedit_ext.datasets import load_zsre

PORTABILITY = {
    "Recalled Relation": "(2006, ...)",
    "New Question": "What was founded in 2006?",
    "New Answer": "Athletics",
}


def record(**changes):
    return {
        "subject": "IAAF",
        "src": "When was the inception of IAAF?",
        "pred": "2011",
        "rephrase": "When was IAAF launched?",
        "alt": "2006",
        "answers": ["1998", "1999"],
        "loc": "nq question: what is the string",
        "loc_ans": "The String",
        "cond": "2011 >> 2006",
        **changes,
    }


def test_the_published_mapping(tmp_path):
    raw = [record(), record(subject="inception of", answers=["a b"])]
    file = tmp_path / "zsre.json"
    file.write_text(json.dumps(raw))
    rest = {
        "paraphrase_prompts": ["When was IAAF launched?"],
        "neighborhood_prompts": [{"prompt": "nq question: what is the string?", "target": "The String"}],
        "attribute_prompts": [],
        "generation_prompts": [],
    }
    rewrites = [
        {"prompt": "When was the inception of {}?", "subject": "IAAF", "target_new": {"str": "1998"}},
        {"prompt": "When was the {} IAAF?", "subject": "inception of", "target_new": {"str": "a b"}},
    ]
    expected = [
        {"case_id": number, "requested_rewrite": rewrite | {"target_true": {"str": "<|endoftext|>"}}, **rest}
        for number, rewrite in enumerate(rewrites)
    ]
    assert load_zsre(file) == load_zsre(raw) == expected


def test_portability_goes_with_the_target_it_presupposes():
    raw = [record(portability=PORTABILITY), record(answers=["2006"], portability=PORTABILITY), record()]
    question = [{"prompt": "What was founded in 2006?", "target": "Athletics"}]
    assert [r.get("portability_prompts") for r in load_zsre(raw)] == [None, question, None]
    records = load_zsre(raw, target="alt")
    assert [r.get("portability_prompts") for r in records] == [question, question, None]
    assert {r["requested_rewrite"]["target_new"]["str"] for r in records} == {"2006"}
    del raw[0]["alt"]
    assert load_zsre(raw[:1])[0]["portability_prompts"] == question


BAD = [
    ("subject", ..., "subject", "is missing"),
    ("subject", "", "subject", "is empty"),
    ("src", "When was it?", "src", "subject 'IAAF' does not occur"),
    ("src", "Is IAAF the IAAF?", "src", "2 times"),
    ("answers", [], "answers", "empty list"),
    ("answers", "1998", "answers", "expected a list"),
    ("answers", [1998], "answers[0]", "expected text"),
    ("rephrase", 7, "rephrase", "expected text"),
    ("loc", ..., "loc", "is missing"),
    ("loc_ans", ..., "loc_ans", "is missing"),
    ("loc_ans", " ", "loc_ans", "is empty"),
    ("portability", "x", "portability", "expected an object"),
    ("portability", {"New Question": "x"}, "portability.New Answer", "is missing"),
]


@pytest.mark.parametrize("key, value, named, reason", BAD)
def test_a_bad_record_is_named(key, value, named, reason):
    bad = record(answers=["2006"]) | {key: value}
    if value is ...:
        del bad[key]
    raw = [record(), bad, record()]
    with pytest.raises(ValueError, match="record 1: ") as error:
        load_zsre(raw)
    assert f"'{named}' " in str(error.value) and reason in str(error.value)
    records = load_zsre(raw, skip_bad=True)
    assert [r["case_id"] for r in records] == [0, 2] and records.bad[0].index == 1


def test_translated_records():
    """Locality questions have no mark, and stand as they are; a record may be there in several languages."""
    chinese = record(
        subject="长城",
        src="谁修建了长城？",
        rephrase="长城是谁修的？",
        loc="谁写了论语？",
        loc_ans="孔子",
        alt="秦始皇",
    )
    (loaded,) = load_zsre([chinese])
    assert loaded["neighborhood_prompts"] == [{"prompt": "谁写了论语？", "target": "孔子"}]
    assert load_zsre([loaded]) == [loaded]
    both = {"case_id": "a", "en": record(), "zh": {k: v for k, v in chinese.items() if k != "answers"}}
    (other,) = load_zsre([both], language="zh")
    assert other["case_id"] == "a" and other["requested_rewrite"]["target_new"] == {"str": "秦始皇"}
    assert load_zsre([both], language="en")[0]["requested_rewrite"]["subject"] == "IAAF"
    with pytest.raises(ValueError, match="record 0 .*is there in en, zh: say which language"):
        load_zsre([both])
    with pytest.raises(ValueError, match="is there in en, zh: there is no 'fr'"):
        load_zsre([both], language="fr")


def test_records_without_paraphrase_or_neighbour():
    bare = {"subject": "IAAF", "src": "When was the inception of IAAF?", "answers": ["1998"]}
    (loaded,) = load_zsre([bare | {"rephrase": None}])
    assert loaded["paraphrase_prompts"] == loaded["neighborhood_prompts"] == []
    assert load_zsre([loaded]) == [loaded]


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match="unknown target 'pred'"):
        load_zsre([record()], target="pred")


def test_real_records(data_dir):
    evaluation, train = data_dir / "zsre_mend_eval_1037.json", data_dir / "zsre_mend_train_1000.json"
    assert len(load_zsre(evaluation)) == 1037 and len(load_zsre(train)) == 1000
    assert len(load_zsre(train, limit=10)) == 10
    asked = load_zsre(evaluation, target="alt")
    assert all(len(r["portability_prompts"]) == 1 for r in asked) and len(asked) == 1037
    with pytest.raises(ValueError, match="record 534: 'alt' is empty\n  record 723: 'alt' is empty"):
        load_zsre(train, target="alt")


def test_loaded_records_are_checked_again():
    loaded = load_zsre([record()])
    assert load_zsre(list(loaded)) == loaded
    for path, value, message in (
        ("paraphrase_prompts", [""], r"'paraphrase_prompts\[0\]' is empty"),
        ("neighborhood_prompts", ["a"], r"'neighborhood_prompts\[0\]' is 'a'"),
        ("portability_prompts", {"a": 1}, "'portability_prompts' is"),
        ("requested_rewrite", [loaded[0]["requested_rewrite"]], "'requested_rewrite' is"),
        ("case_id", float("nan"), "'case_id' is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            load_zsre([loaded[0] | {path: value}])
