"""Attribute snippets and tf-idf files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from knowedit_ext.datasets import (
    load_counterfact,
    load_snippets,
    load_tfidf,
    snippets_for,
    wanted_snippets,
    with_snippets,
)
from knowedit_ext.world import load_world


def entry(relation="P19", target="Q1", *names):
    return {
        "relation_id": relation,
        "target_id": target,
        "samples": [{"name": n, "text": f"About {n}."} for n in names],
    }


def record(case_id, relation, target):
    rewrite = {"relation_id": relation, "target_new": {"str": "Rome", "id": target}}
    return {"case_id": case_id, "requested_rewrite": rewrite}


ENTRIES = [entry("P19", "Q1", "a", "b"), entry("P19", "Q2", "c"), entry("P20", "Q1"), entry("P19", "Q1", "d")]


@pytest.fixture(params=["file", "list"])
def source(request, tmp_path):
    def of(entries):
        if request.param == "list":
            return entries
        file = tmp_path / "attribute_snippets.json"
        file.write_text(json.dumps(entries))
        return file

    return of


def test_snippets_by_relation_and_target(source):
    snippets = load_snippets(source(ENTRIES))
    assert [s["name"] for s in snippets["P19"]["Q1"]] == ["a", "b", "d"]  # entries of one pair are joined, as published
    assert snippets["P19"]["Q2"] == [{"name": "c", "text": "About c."}] and snippets["P20"]["Q1"] == []


def test_only_some_pairs(source):
    snippets = load_snippets(source(ENTRIES), only={("P19", "Q2"), ("P99", "Q9")})
    assert snippets == {"P19": {"Q2": [{"name": "c", "text": "About c."}]}}


BAD = [
    ([], "is a list"),
    ({"target_id": "Q1", "samples": []}, "'relation_id' is missing"),
    ({"relation_id": "P1", "target_id": 4, "samples": []}, "'target_id' is 4"),
    ({"relation_id": "P1", "target_id": "Q1", "samples": {}}, "'samples' is {}"),
    ({"relation_id": "P1", "target_id": "Q1", "samples": ["x"]}, r"'samples\[0\]' is 'x'"),
    ({"relation_id": "P1", "target_id": "Q1", "samples": [{"name": "x"}]}, r"'samples\[0\].text' is missing"),
    ({"relation_id": "P1", "target_id": "Q1", "samples": [{"name": "x", "text": 1}]}, r"'samples\[0\].text' is 1"),
]


@pytest.mark.parametrize("bad, reason", BAD)
def test_a_bad_entry_is_named(source, bad, reason):
    with pytest.raises(ValueError, match=f"record 2: {reason}"):
        load_snippets(source([*ENTRIES[:2], bad]))


def test_files_that_are_none(tmp_path):
    file = tmp_path / "snippets.json"
    for text, reason in (("[", "is not JSON"), ("{}", "holds a dict, expected a list of entries")):
        file.write_text(text)
        for only in (None, {("P19", "Q1")}):
            with pytest.raises(ValueError, match=f"snippets.json' {reason}"):
                load_snippets(file, only=only)


def test_missing_snippets_name_relation_and_target(caplog):
    snippets = load_snippets(ENTRIES)
    good, empty, absent, flat = (
        record(1, "P19", "Q2"),
        record(2, "P20", "Q1"),
        record(3, "P99", "Q7"),
        record(4, None, None),
    )
    assert snippets_for(snippets, good) == [{"name": "c", "text": "About c."}]
    for bad in (empty, absent):
        relation, target = bad["requested_rewrite"]["relation_id"], bad["requested_rewrite"]["target_new"]["id"]
        with pytest.raises(ValueError, match=f"no snippets for relation {relation} and target {target}"):
            snippets_for(snippets, bad)
    with pytest.raises(ValueError, match="case_id 4: is unknown"):
        snippets_for(snippets, flat)
    records = [good, empty, absent, flat]
    assert wanted_snippets(records) == {("P19", "Q2"), ("P20", "Q1"), ("P99", "Q7")}
    with pytest.raises(ValueError, match="3 bad records"):
        with_snippets(records, snippets)
    complete = with_snippets(records, snippets, skip_bad=True)
    assert complete == [good] and [bad[:2] for bad in complete.bad] == [(1, 2), (2, 3), (3, 4)]
    assert with_snippets(complete, snippets).bad == complete.bad  # what was left out before stays told


def test_the_world_has_snippets_for_every_record():
    world = load_world()
    records = load_counterfact(world.records())
    snippets = load_snippets(world.snippets(), only=wanted_snippets(records))
    assert len(with_snippets(records, snippets)) == len(records) == 1260
    for rewrite, texts in ((r["requested_rewrite"], snippets_for(snippets, r)) for r in records[:200]):
        assert all(rewrite["target_new"]["str"] in sample["text"] for sample in texts)


def write_tfidf(folder, idf, vocabulary):
    np.save(folder / "idf.npy", np.asarray(idf), allow_pickle=True)
    (folder / "tfidf_vocab.json").write_text(json.dumps(vocabulary))
    return folder / "idf.npy", folder / "tfidf_vocab.json"


def test_tfidf_files(tmp_path):
    idf, vocabulary = [1.5, 2.0, 3.25], {"piano": 2, "a": 0, "trumpet": 1}
    tfidf = load_tfidf(*write_tfidf(tmp_path, np.float32(idf), vocabulary))
    assert tfidf.idf.dtype == np.float64 and tfidf.idf.tolist() == idf and tfidf.vocabulary == vocabulary


def test_tfidf_files_weigh_texts_as_scikit_learn_did(tmp_path):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    texts = ["The trumpet of Rome", "a piano in Rome", "rome and its trumpets"]
    fitted = text.TfidfVectorizer().fit(texts)
    tfidf = load_tfidf(*write_tfidf(tmp_path, fitted.idf_, {k: int(v) for k, v in fitted.vocabulary_.items()}))
    again = text.TfidfVectorizer(vocabulary=tfidf.vocabulary)
    again.idf_ = tfidf.idf
    assert np.array_equal(again.transform(texts).toarray(), fitted.transform(texts).toarray())


@pytest.mark.parametrize(
    "idf, vocabulary, reason",
    [
        ([1.0, 2.0], {"a": 0}, "2 numbers, .* 1 terms: not of one pair"),
        ([1.0, 2.0], {"a": 0, "b": 2}, "the numbers 0..1, each once"),
        ([1.0, 2.0], {"a": 0, "b": 0}, "the numbers 0..1, each once"),
        ([1.0, 2.0], {"a": 0, "b": "1"}, "the numbers 0..1, each once"),
        ([1.0, 2.0], {"a": 0, "b": True}, "the numbers 0..1, each once"),
        ([1.0, np.nan], {"a": 0, "b": 1}, "not finite and positive"),
        ([1.0, -1.0], {"a": 0, "b": 1}, "not finite and positive"),
        ([[1.0, 2.0]], {"a": 0, "b": 1}, r"holds float64 \[1, 2\], expected"),
        ([1, 2], {"a": 0, "b": 1}, r"holds int64 \[2\], expected"),
        ([], {}, r"holds float64 \[0\], expected"),
        (np.array([{}, {}], dtype=object), {"a": 0, "b": 1}, "is not a .npy file of numbers"),
        ([1.0], ["a"], "holds a list, expected an object term -> index"),
    ],
)
def test_tfidf_files_that_do_not_hold(tmp_path, idf, vocabulary, reason):
    with pytest.raises(ValueError, match=reason):
        load_tfidf(*write_tfidf(tmp_path, idf, vocabulary))


def test_an_idf_file_with_any_byte_changed_or_lost(tmp_path):
    idf, vocabulary = write_tfidf(tmp_path, [1.0, 2.0], {"a": 0, "b": 1})
    whole = idf.read_bytes()
    header = len(whole) - 16
    for at in range(header):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :]):
            idf.write_bytes(damaged)
            try:
                assert load_tfidf(idf, vocabulary).idf.tolist() == [1.0, 2.0]
            except ValueError as error:
                assert "idf.npy" in str(error), at  # noqa: PT017


@pytest.mark.parametrize("wrong", [None, 3, [], {}, ["P19"], True])
@pytest.mark.parametrize("key", ["relation_id", "target_id"])
def test_entries_whose_ids_are_no_text(tmp_path, key, wrong):
    (tmp_path / "snippets.json").write_text(
        json.dumps([entry("P19", "Q1", "a"), entry("P19", "Q1", "b") | {key: wrong}])
    )
    for only in (None, {("P19", "Q1")}):
        with pytest.raises(ValueError, match=key):
            load_snippets(tmp_path / "snippets.json", only=only)


def test_files_that_are_no_tfidf_files(tmp_path):
    idf, vocabulary = write_tfidf(tmp_path, [1.0], {"a": 0})
    for content in (b"", b"not an array"):
        idf.write_bytes(content)
        with pytest.raises(ValueError, match="idf.npy' is not a .npy file"):
            load_tfidf(idf, vocabulary)
