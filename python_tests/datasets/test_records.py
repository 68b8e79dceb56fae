"""Every loader, for everything that somebody may hand it: checked records, or a ValueError that says what is wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import knowedit_ext as ke
from knowedit_ext.datasets import (
    DATASETS,
    load_counterfact,
    load_knowedit,
    load_known,
    load_mquake,
    load_rippleedits,
    load_snippets,
    load_wikibigedit,
    load_zsre,
)
from knowedit_ext.datasets.questions import rewrites_of
from knowedit_ext.editing.request import check_requests
from knowedit_ext.evaluation.metrics import asking

LOADERS = [load_counterfact, load_zsre, load_known, load_snippets, load_knowedit, load_mquake, load_rippleedits]
REWRITE = {"prompt": "{} plays the", "subject": "Anna", "target_new": {"str": "harp"}, "target_true": {"str": "lute"}}
COUNTERFACT = {
    "case_id": 1,
    "requested_rewrite": REWRITE,
    "paraphrase_prompts": ["Anna has a"],
    "neighborhood_prompts": ["Bo plays the"],
}
FLAT = {"case_id": 2, "prompt": "Anna plays the", "subject": "Anna", "target_new": "harp", "ground_truth": "lute"}
FLAT |= {"rephrase_prompt": "Anna has a", "locality_prompt": "Bo plays the"}
ZSRE = {"subject": "Anna", "src": "What does Anna play?", "rephrase": "Anna plays?", "answers": ["harp"], "alt": "lute"}
ZSRE |= {"loc": "nq question: who", "loc_ans": "Bo"}
KNOWN = {"known_id": 3, "prompt": "Anna plays the", "subject": "Anna", "attribute": "harp"}
GROUP = [{"prompt": "The strings of Anna are on a", "ground_truth": [["harp", "lyre"], ["the harp"]]}]
KNOWEDIT = {"subject": "Anna", "prompt": "Anna plays the", "target_new": ["harp", "lyre"], "ground_truth": [["lute"]]}
KNOWEDIT |= {"rephrase_prompt": "Anna has a", "portability": {"Reasoning": GROUP, "Subject_Aliasing": GROUP}}
KNOWEDIT |= {"locality": {"Relation_Specificity": GROUP, "Forgetfulness": [{"prompt": ["A"], "ground_truth": "B"}]}}
BIOGRAPHY = {"text": "This is about Anna. She was born in Oslo.", "labels": "She plays the harp.", "concept": "Anna"}
HOP = {"question": "What has Anna?", "cloze": "Anna has a", "answer": "harp", "answer_alias": ["lyre"]}
MQUAKE = {
    "case_id": 4,
    "requested_rewrite": [REWRITE, {**REWRITE, "subject": "Bo"}],
    "questions": ["Who made what Anna plays?", "Whose harp is it?"],
    "answer": "Olga",
    "answer_alias": [],
    "new_answer": "Cy",
    "new_answer_alias": ["Cyrus"],
    "new_single_hops": [HOP, {k: v for k, v in HOP.items() if k in ("question", "answer")}],
}
QUERY = {"prompt": "The name of the father of Anna is", "answers": [{"value": "Bo", "aliases": ["Bob"]}]}
QUERY |= {"query_type": "regular", "subject_id": "Q1", "target_ids": ["Q3"], "phrase": None}
TEST = {"test_queries": [QUERY], "test_condition": "OR", "condition_queries": [QUERY]}
OLD_FACT = {"prompt": "The name of the mother of Anna is Cy.", "subject_id": "Q1", "target_id": "Q3"}
RIPPLE = {"example_type": "popular", "edit": OLD_FACT | {"prompt": "The name of the mother of Anna is Di."}}
RIPPLE["edit"] = RIPPLE["edit"] | {"original_fact": OLD_FACT}
RIPPLE |= {"Relation_Specificity": [TEST], "Subject_Aliasing": [TEST], "Compositionality_II": []}
WIKIBIGEDIT = {"tag": "new", "subject": "Anna", "update": "What does Anna play?", "ans": "harp", "rephrase": "Anna?"}
WIKIBIGEDIT |= {"personas": "Hey, Anna?", "mhop": "Whose?", "mhop_ans": "Bo", "loc": "Who?", "loc_ans": "Cy"}
GOOD = {
    "counterfact": (load_counterfact, COUNTERFACT),
    "flat": (load_counterfact, FLAT),
    "zsre": (load_zsre, ZSRE),
    "loaded zsre": (load_zsre, load_zsre([ZSRE])[0]),
    "known": (load_known, KNOWN),
    "knowedit": (load_knowedit, KNOWEDIT),
    "biography": (load_knowedit, BIOGRAPHY),
    "loaded knowedit": (load_knowedit, load_knowedit([KNOWEDIT])[0]),
    "mquake": (load_mquake, MQUAKE),
    "rippleedits": (load_rippleedits, RIPPLE),
    "loaded rippleedits": (load_rippleedits, load_rippleedits([RIPPLE])[0]),
    "wikibigedit": (load_wikibigedit, WIKIBIGEDIT),
    "loaded mquake": (load_mquake, load_mquake([MQUAKE])[0]),
}
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.binary(max_size=2)
    | st.sampled_from(["", " ", "{}", "{} {}", "Anna", "Anna Anna", "a\ud800", "../x", "nq question: "]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["str", "prompt"]), inner, max_size=2),
    max_leaves=3,
)


def places(value, path=()):
    """The paths of everything inside a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("source", [None, 3, b"x", {"case_id": 1}, COUNTERFACT, [None], ["Anna"], [[KNOWN]], [3.0]])
def test_what_is_no_list_of_records(loader, source) -> None:
    with pytest.raises(ValueError, match="expected"):
        loader(source)


@pytest.mark.parametrize("name", GOOD)
def test_the_good_ones_load(name: str) -> None:
    loader, record = GOOD[name]
    assert len(loader([record])) == 1


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(sorted(GOOD)), ODD)
def test_one_value_changed(data, name: str, odd) -> None:
    """It loads, and can then be asked about, or it is refused with the record's place."""
    loader, record = GOOD[name]
    bad = changed(record, data.draw(st.sampled_from(list(places(record)))), odd)
    try:
        records = loader([bad])
    except ValueError as error:
        assert "record 0" in str(error) and len(str(error)) < 1500
        return
    if loader is load_known:
        assert isinstance(records[0].fact, ke.Fact)
    else:
        kind = next(name for name, dataset in DATASETS.items() if dataset.load is loader)
        questions, _ = asking(DATASETS[kind].ask)(None, records[0], 0, True)
        assert all(isinstance(q.prompt, str) and all(isinstance(t, str) for t in q.targets) for q in questions)
        assert len(check_requests(records)) == len(rewrites_of(records[0]))
        assert loader(list(records)) == records


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_key_is_named(name: str) -> None:
    loader, record = GOOD[name]
    optional = {"known_id", "paraphrase_prompts", "neighborhood_prompts", "rephrase_prompt", "locality_prompt"}
    if "zsre" in name:
        optional |= {"alt", "answers", "rephrase", "attribute_prompts", "generation_prompts", "requested_rewrite"}
    if loader in (load_knowedit, load_mquake, load_rippleedits, load_wikibigedit):
        optional = record.keys() - {"subject", "concept", "prompt", "text", "target_new", "labels", "questions"}
        optional -= {"new_answer", "requested_rewrite", "edit", "update", "ans", "mhop_ans", "loc_ans"}
    for key in record.keys() - optional:
        with pytest.raises(ValueError, match=key):
            loader([{k: v for k, v in record.items() if k != key}])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "content",
    ["", "{", "{}", "null", '"x"', "[1, NaN]", '[{"case_id": 1, "case_id": 2}]', "[" * 100_000, "[" + "9" * 5000 + "]"],
)
def test_files_that_hold_no_records(loader, content: str, tmp_path) -> None:
    file = tmp_path / "records.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="records.json'"):
        loader(file)


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "many", float("nan")])
def test_limits_that_make_no_sense(limit) -> None:
    with pytest.raises(ValueError, match="limit is"):
        load_counterfact([COUNTERFACT], limit=limit)


def test_a_data_set_knows_its_records() -> None:
    for name, (_, record) in GOOD.items():
        if name != "known":
            first = next(kind for kind, dataset in DATASETS.items() if dataset.detect(record))
            own = {"flat": "counterfact", "biography": "knowedit"}
            assert first == own.get(name, name.removeprefix("loaded "))
    assert json.dumps(load_zsre([ZSRE])[0])


def test_known_facts_without_numbers_are_numbered_in_order() -> None:
    record = {name: value for name, value in KNOWN.items() if name != "known_id"}
    given = [record, ke.Fact("{} has a", "Bo", attribute="lute"), record]
    assert [(known.known_id, known.fact.subject) for known in load_known(given)] == [
        (0, "Anna"),
        (1, "Bo"),
        (2, "Anna"),
    ]
    assert "known_id" not in record


def test_known_facts_go_by_whole_words() -> None:
    record = KNOWN | {"prompt": "In Annaburg, Anna and Anna play the"}
    fact = load_known([record])[0].fact
    assert fact.prompt == "In Annaburg, {} and Anna play the" and fact.subject_chars() == (13, 17)
