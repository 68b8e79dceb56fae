"""Data sets and parameter files: as JSON files and as objects in memory."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import knowedit_ext as ke
from knowedit_ext.datasets import (
    load_counterfact,
    load_known,
    load_snippets,
    load_tfidf,
    load_zsre,
)
from knowedit_ext.editing.methods import METHODS
from knowedit_ext.moments.corpora import open_corpus

from .. import mutations, subjects
from ..outcome import Case


def records(random: Random, folder: Path) -> Case:
    """Records of every schema through every loader."""
    sound = random.choice((subjects.RECORDS, subjects.FLAT, subjects.ZSRE, subjects.KNOWEDIT, subjects.MQUAKE))
    load = random.choice((load_counterfact, load_counterfact, load_zsre))
    given = mutations.json_value(random, sound)
    options = dict(skip_bad=random.random() < 0.3)
    source, names = _source(random, folder, given)

    def check(found: Any) -> None:
        assert all(isinstance(record, dict) for record in found)
        json.dumps(found)
        if load is load_counterfact:
            assert load_counterfact(list(found)) == found, "loaded twice is not loaded once"

    return Case(lambda: load(source, **options), check, names, _short(given))


def evaluated(random: Random, folder: Path) -> Case:
    """Records measured on a model."""
    given = mutations.json_value(random, random.choice((subjects.RECORDS, subjects.FLAT, subjects.ZSRE)))
    family = random.choice(("gpt2", "llama"))
    options = dict(skip_bad=random.random() < 0.3, generation=random.random() < 0.1, max_length=12)
    edit = subjects.edit("memit") if family == "gpt2" and random.random() < 0.5 else None
    source, _ = _source(random, folder, given)
    out = folder / "out" if random.random() < 0.3 else None

    def check(report: ke.Report) -> None:
        text = json.dumps(report.to_dict(), allow_nan=False, ensure_ascii=False)
        text.encode()
        json.dumps(report.cases, allow_nan=False)
        assert report.cases and report.table()
        if out is not None:
            assert ke.Report.load(out).cases == json.loads(json.dumps(report.cases)), "the folder holds others"

    return Case(
        lambda: ke.evaluate(subjects.model(family), source, edit, out=out, **options), check, shown=_short(given)
    )


def known(random: Random, folder: Path) -> Case:
    """Facts to trace, through the loader and through `trace_dataset`."""
    given = mutations.json_value(random, subjects.KNOWN)
    source, names = _source(random, folder, given)
    if random.random() < 0.6:
        return Case(lambda: load_known(source), _known_facts, names, _short(given))
    out = folder / "out"
    options = dict(kinds=("state",), samples=1, window=2, progress=False)

    def check(effects: ke.Effects) -> None:
        json.dumps(json.loads((out / "summary.json").read_text()), allow_nan=False)

    return Case(lambda: ke.trace_dataset(subjects.model(), source, out, **options), check, shown=_short(given))


def _known_facts(found: list) -> None:
    assert found and len({item.known_id for item in found}) == len(found)
    for item in found:
        assert item.fact.subject in item.fact.text and isinstance(item.known_id, int)


def snippets(random: Random, folder: Path) -> Case:
    given = mutations.json_value(random, subjects.SNIPPETS)
    source, names = _source(random, folder, given)
    only = random.choice((None, {("P36", "Q3")}))

    def check(found: dict) -> None:
        for targets in found.values():
            for samples in targets.values():
                assert all(isinstance(sample["text"], str) for sample in samples)

    return Case(lambda: load_snippets(source, only=only), check, names, _short(given))


def tfidf(random: Random, folder: Path) -> Case:
    idf, vocabulary = np.array([1.0, 2.5, 3.0]), {"violin": 0, "the": 1, "mayor": 2}
    words = folder / "vocab.json"
    words.write_text(json.dumps(mutations.json_value(random, vocabulary, random.choice((0, 1)))))
    numbers = folder / "idf.npy"
    np.save(numbers, mutations.array(random, idf) if random.random() < 0.5 else idf, allow_pickle=False)
    if random.random() < 0.5:
        chosen = random.choice((words, numbers))
        chosen.write_bytes(mutations.octets(random, chosen.read_bytes()))

    def check(found: Any) -> None:
        assert np.isfinite(found.idf).all() and len(found.idf) == len(found.vocabulary)

    return Case(lambda: load_tfidf(numbers, words), check, ("vocab.json", "idf.npy"))


def corpora(random: Random, folder: Path) -> Case:
    """Texts to collect moments over."""
    path = folder / random.choice(("texts.txt", "texts.json", "texts.jsonl"))
    sound = [random.choice((text, {"text": text})) for text in subjects.TEXTS[:5]]
    given = mutations.json_value(random, sound) if random.random() < 0.6 else sound
    if path.suffix == ".json":
        content = json.dumps(given)
    else:
        lines = given if isinstance(given, list) else [given]
        content = "\n".join(json.dumps(x) if path.suffix == ".jsonl" else str(x) for x in lines)
    data = content.encode("utf-8", "surrogatepass")
    path.write_bytes(mutations.octets(random, data) if random.random() < 0.5 else data)
    source: Any = random.choice((path, folder, given))

    def call() -> Any:
        if random.random() < 0.5:
            corpus = open_corpus(source)
            return [corpus[number] for number in range(len(corpus))]
        return ke.collect_moments(subjects.model(), source, [1], progress=False)

    def check(found: Any) -> None:
        if isinstance(found, ke.Moments):
            assert found[1].count > 0 and bool(found[1].matrix().isfinite().all())
        else:
            assert all(isinstance(text, str) for text in found)

    return Case(call, check, shown=_short(given))


def params(random: Random, folder: Path) -> Case:
    """Hyper-parameters as a dict, a JSON or a YAML file."""
    method = random.choice(list(METHODS))
    row, sound = METHODS[method], subjects.params(method)
    given = mutations.json_value(random, sound)
    source, names = given, ()
    if random.random() < 0.5:
        path = source = folder / random.choice(("params.json", "params.yaml", "params.yml"))
        data = _spelled(path, given).encode("utf-8", "surrogatepass")
        path.write_bytes(mutations.octets(random, data) if random.random() < 0.3 else data)
        names = (path.name,)

    def check(found: Any) -> None:
        assert row.params.from_dict(found.to_dict()) == found
        assert all(isinstance(layer, int) and layer >= 0 for layer in found.layers), "layers"
        for name, number in found.to_dict().items():
            if isinstance(sound.get(name), (int, float)) and not isinstance(sound[name], bool) and number is not None:
                assert isinstance(number, (int, float)) and not isinstance(number, bool), f"{name} is {number!r}"
        json.dumps(found.to_dict(), allow_nan=False)

    return Case(lambda: row.params_of(source), check, names, f"{method} {_short(given)}")


def _spelled(path: Path, given: Any) -> str:
    if path.suffix == ".json":
        return json.dumps(given)
    import yaml

    return yaml.safe_dump(given, allow_unicode=True) if _plain(given) else json.dumps(given)


def _plain(given: Any) -> bool:
    return isinstance(given, dict) and all(isinstance(x, (int, float, list)) for x in given.values())


def _source(random: Random, folder: Path, given: Any) -> tuple[Any, tuple[str, ...]]:
    """The value itself, or a file of it, whole or damaged; and what an error must name."""
    if random.random() < 0.4:
        return given, ()
    path = folder / "given.json"
    data = json.dumps(given, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    path.write_bytes(mutations.octets(random, data) if random.random() < 0.3 else data)
    return path, ("given.json",)


def _short(given: object) -> str:
    return json.dumps(given, default=repr)[:300]


DOORS = (records, evaluated, known, snippets, tfidf, corpora, params)
