"""Case files that are damaged, foreign or of two runs: an error that names file and key, never a wrong mean."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knowedit_ext.evaluation.report import Report, side_by_side

from .test_scores import case

NUMBERS = st.one_of(st.floats(), st.integers(), st.booleans(), st.none(), st.text(max_size=3))
VALUES = st.recursive(
    NUMBERS, lambda inside: st.lists(inside, max_size=2) | st.dictionaries(st.text(), inside), max_leaves=3
)


def good() -> dict:
    made = case(4, random.Random(0), "P0")
    made["post"] = copy.deepcopy(made["post"]) | {"ngram_entropy": 5.0, "reference_score": 0.5, "text": ["a"]}
    return made | {"grouped_case_ids": [4], "num_edits": 1, "time": 1.5}


def write(folder: Path, value: object, number: int = 4) -> Path:
    path = folder / f"1_edits-case_{number}.json"
    path.write_text(json.dumps(value))
    return path


def without(*keys: str) -> Callable[[dict], None]:
    def change(value: dict) -> None:
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return change


def put(new: object, *keys: str | int) -> Callable[[dict], None]:
    def change(value: dict) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = new

    return change


def test_the_good_one_is_read(tmp_path: Path) -> None:
    write(tmp_path, good())
    assert Report.load(tmp_path).cases == [good()]


@pytest.mark.parametrize(
    "change, message",
    [
        (without("case_id"), "it lacks case_id"),
        (put(None, "case_id"), "case_id is None: expected int or str"),
        (put(True, "case_id"), "case_id is True"),
        (without("requested_rewrite"), "it lacks requested_rewrite"),
        (put([], "requested_rewrite"), "requested_rewrite is []: expected dict"),
        (without("requested_rewrite", "subject"), "it lacks requested_rewrite.subject"),
        (put("A", "requested_rewrite", "target_new"), "requested_rewrite.target_new is 'A': expected dict"),
        (without("requested_rewrite", "target_true", "str"), "it lacks requested_rewrite.target_true.str"),
        (put(3, "requested_rewrite", "relation_id"), "requested_rewrite.relation_id is 3"),
        (lambda value: [value.pop("pre"), value.pop("post")], "it has neither pre nor post"),
        (put([], "post"), "post is []: expected dict"),
        (put({}, "post"), "post holds nothing that was measured"),
        (put({"text": ["a"]}, "pre"), "pre holds nothing that was measured (text)"),
        (put({}, "post", "rewrite_prompts_probs"), "post.rewrite_prompts_probs is {}: expected a list"),
        (
            put(1.0, "post", "rewrite_prompts_probs", 0),
            "post.rewrite_prompts_probs[0] is 1.0: expected an object with target_new and target_true",
        ),
        (
            without("post", "neighborhood_prompts_probs", 3, "target_true"),
            "post.neighborhood_prompts_probs[3] is {'target_new': ",
        ),
        (put("x", "post", "rewrite_prompts_probs", 0, "target_new"), "post.rewrite_prompts_probs[0].target_new is 'x'"),
        (put(float("nan"), "pre", "rewrite_prompts_probs", 0, "target_new"), "target_new is nan: expected a finite"),
        (put(float("inf"), "pre", "rewrite_prompts_probs", 0, "target_new"), "target_new is inf"),
        (put(10**400, "pre", "rewrite_prompts_probs", 0, "target_new"), "expected a finite number"),
        (put(-101.0, "pre", "rewrite_prompts_probs", 0, "target_new"), "target_new is -101.0"),
        (
            put(1.5, "pre", "rewrite_prompts_correct", 0),
            "pre.rewrite_prompts_correct[0] is 1.5: expected a finite",
        ),
        (put("yes", "post", "paraphrase_prompts_correct", 1), "post.paraphrase_prompts_correct[1] is 'yes'"),
        (put(float("nan"), "post", "reference_score"), "post.reference_score is nan"),
        (put("fast", "time"), "time is 'fast'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: Callable[[dict], None], message: str) -> None:
    value = good()
    change(value)
    path = write(tmp_path, value)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        Report.load(tmp_path)
    assert f"'{path}' is no case of an evaluation" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_no_object_is_named(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, good())
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"'{path}'")):
        Report.load(tmp_path)


def test_two_runs_in_one_folder_are_not_averaged(tmp_path: Path) -> None:
    write(tmp_path, good())
    (tmp_path / "3_edits-case_4.json").write_text(json.dumps(good()))
    with pytest.raises(ValueError, match="are both about case 4: of two runs"):
        Report.load(tmp_path)


@pytest.mark.parametrize(
    "content", ['{"settings": []}', '{"skipped": {}}', '{"settings": {"a": NaN}}', '{"skipped": [Infinity]}', "[]", "{"]
)
def test_a_foreign_report(tmp_path: Path, content: str) -> None:
    write(tmp_path, good())
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match="report.json'"):
        Report.load(tmp_path)


def paths(value: object, above: tuple = ()) -> list[tuple]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([above] if above else []), *(path for key, v in inside for path in paths(v, (*above, key)))]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(paths(good())), value=VALUES)
def test_whatever_stands_anywhere_a_case_is_refused_or_can_be_reported(tmp_path: Path, path: tuple, value) -> None:
    changed = good()
    put(value, *path)(changed)
    write(tmp_path, changed)
    try:
        report = Report.load(tmp_path)
    except ValueError as error:
        assert str(tmp_path) in str(error)
    else:
        assert "nan" not in side_by_side({"x": report}) + report.markdown()
        report.to_dict()


def test_cases_with_generated_text_alone_have_no_worst_one() -> None:
    report = Report([good() | {"pre": {"ngram_entropy": 4.0}, "post": {"ngram_entropy": 5.0}}])
    assert report.worst() == [] and report.summary()["GE"].mean == 500 and report.to_dict()["worst"] == []
