"""Texts that hypothesis makes up, and shrinks where one does harm; HYPOTHESIS_EXAMPLES says how many."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from campaign import subjects
from campaign.outcome import fault_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import knowedit_ext as ke
from knowedit_ext.datasets import load_counterfact, load_known
from knowedit_ext.model.facts import tokenize_fact

ANY = st.characters(exclude_categories=())  # half surrogates too
TEXT = st.text(ANY, max_size=40)
TEMPLATE = st.builds("{}{{}}{}".format, TEXT, TEXT) | TEXT
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
many = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", 50)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def _refused(error: Exception) -> None:
    fault = fault_of(error, ())
    assert fault is None, f"{fault}: {error!r}"


@many
@given(TEMPLATE, TEXT, TEXT | st.none(), st.sampled_from(["gpt2", "llama"]))
def test_facts(prompt: str, subject: str, target: str | None, family: str) -> None:
    model = subjects.model(family)
    try:
        fact = ke.Fact(prompt, subject, target)
        found = tokenize_fact(model, fact)
    except Exception as error:
        return _refused(error)
    first, after = fact.subject_chars()
    assert fact.text[first:after] == subject
    assert model.tokenizer.decode(found.ids, skip_special_tokens=False).endswith(fact.text)  # bytes lose nothing
    first, after = found.subject_range
    assert subject.strip() in model.tokenizer.decode(found.ids[first:after])


@many
@given(TEMPLATE, TEXT, TEXT, TEXT | st.none())
def test_requests(prompt: str, subject: str, new: str, true: str | None) -> None:
    raw = dict(prompt=prompt, subject=subject, target_new=new, target_true=true)
    try:
        request = ke.EditRequest.of(raw)
    except Exception as error:
        return _refused(error)
    assert request.target_new.strip() == new.strip()
    assert ke.EditRequest.of(request.to_dict()) == request


@many
@given(st.data(), st.sampled_from(["RECORDS", "FLAT"]))
def test_records(data: st.DataObject, schema: str) -> None:
    record = dict(getattr(subjects, schema)[0])
    for key in data.draw(st.sets(st.sampled_from(sorted(record)), min_size=1, max_size=2)):
        record[key] = data.draw(JSON)
    try:
        found = load_counterfact([record])
    except Exception as error:
        return _refused(error)
    assert load_counterfact(list(found)) == found


@many
@given(JSON)
def test_known_facts(given: object) -> None:
    try:
        load_known([{**subjects.KNOWN[0], "attribute": given}, given])
    except Exception as error:
        _refused(error)


@many
@given(st.binary(max_size=200), st.sampled_from(["edit.safetensors", "trace.npz"]))
def test_files_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str) -> None:
    path = Path(tmp_path_factory.mktemp("bytes")) / name
    path.write_bytes(content)
    load = ke.Edit.load if path.suffix == ".safetensors" else ke.Trace.load
    with pytest.raises(ValueError) as error:
        load(path)
    assert fault_of(error.value, (name,)) is None
