"""Where texts come from."""

from __future__ import annotations

import json
import random
import sys
from types import SimpleNamespace

import pytest

from knowedit_ext.moments.corpora import Corpus, open_corpus


def listed(corpus: Corpus) -> list[str]:
    return [corpus[i] for i in range(len(corpus))]


def test_lists_and_iterators():
    assert listed(open_corpus(["a", "b"])) == ["a", "b"]
    assert listed(open_corpus(x for x in "ab")) == ["a", "b"]
    assert listed(open_corpus([{"text": "a"}, "b"])) == ["a", "b"]


def test_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("one\n\n  two \u2028 still two\nthree")
    (tmp_path / "a.json").write_text(json.dumps(["x\ny", {"text": "z"}]))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.jsonl").write_text('{"text": "p", "id": 1}\n"q"\n\n')
    (tmp_path / "notes.md").write_text("not text to collect over")
    assert listed(open_corpus(tmp_path / "b.txt")) == ["one", "  two \u2028 still two", "three"]
    assert listed(open_corpus(str(tmp_path / "a.json"))) == ["x\ny", "z"]
    assert listed(open_corpus(tmp_path)) == ["x\ny", "z", "one", "  two \u2028 still two", "three", "p", "q"]


def test_shuffle_is_the_published_sample():
    order = list(range(20))
    random.Random(1).shuffle(order)
    assert listed(open_corpus([str(i) for i in range(20)], max_texts=5, shuffle=1)) == [str(i) for i in order[:5]]
    assert listed(open_corpus(["a", "b"], max_texts=9)) == ["a", "b"]


def test_groups_and_hashes():
    corpus = open_corpus(["a", "b", "c"])
    assert list(corpus.groups(2)) == [["a", "b"], ["c"]] and list(corpus.groups(2, first=2)) == [["c"]]
    assert corpus.sha256(2) == open_corpus(["a", "b"]).sha256(2) != open_corpus(["ab", ""]).sha256(2)


def test_data_sets_by_name(monkeypatch):
    asked = []

    class Column(list):
        column_names = ["text", "title"]

    def load_dataset(*names, split):
        asked.append((*names, split))
        return Column([{"text": "a", "title": "t"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in ("wikipedia", "wikitext", "wikipedia:20231101.de", "org/some", "org/some:part"):
        assert listed(open_corpus(name)) == ["a"]
    assert asked == [
        ("wikimedia/wikipedia", "20231101.en", "train"),
        ("Salesforce/wikitext", "wikitext-103-raw-v1", "train"),
        ("wikimedia/wikipedia", "20231101.de", "train"),
        ("org/some", "train"),
        ("org/some", "part", "train"),
    ]
    Column.column_names = ["title"]
    with pytest.raises(ValueError, match="data set 'wikitext' has no column 'text': title"):
        open_corpus("wikitext")


def test_mistakes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="'wikipedia' is neither a file nor a folder.*install the datasets library"):
        open_corpus("wikipedia")
    monkeypatch.delitem(sys.modules, "datasets")
    (tmp_path / "datasets").mkdir()  # in the working directory, say
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="'wikipedia' is neither a file nor a folder.*only a folder 'datasets'"):
        open_corpus("wikipedia")
    with pytest.raises(ValueError, match=r"has no \.txt, \.jsonl, \.json file"):
        open_corpus(tmp_path)
    (tmp_path / "a.jsonl").write_text('"fine"\n{"title": 1}\n')
    with pytest.raises(ValueError, match="a.jsonl' line 2 is NoneType|a.jsonl' line 2"):
        open_corpus(tmp_path)
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        open_corpus(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="holds dict: expected a list of texts"):
        open_corpus(tmp_path / "a.json")
    with pytest.raises(ValueError, match="max_texts is 0"):
        open_corpus(["a"], max_texts=0)
