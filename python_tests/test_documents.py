"""JSON and YAML files: their content, or a ValueError that names the file."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from knowedit_ext.documents import read_json, read_yaml


@pytest.mark.parametrize(
    "read, content, message",
    [
        (read_json, "{", "is not JSON"),
        (read_json, "", "is not JSON"),
        (read_json, '{"a": NaN}', "is not JSON: NaN is no number of JSON"),
        (read_json, '[{"a": 1, "b": 2, "a": 3}]', "is not JSON: an object has the key 'a' twice"),
        (read_json, "[" * 200_000, "is nested too deeply"),
        (read_json, "9" * 5000, "is not JSON"),
        (read_json, b"\xff", "is not JSON"),
        (read_yaml, "a: [", "is not YAML: [^\n]*$"),
        (read_yaml, "a: 1\nb: 2\na: 3", "is not YAML: .*the key 'a' twice"),
        (read_yaml, "a: !!python/object/apply:os.getcwd []", "is not YAML"),
        (read_yaml, "a: 1\n---\nb: 2", "is not YAML"),
        (read_yaml, "a: 2001-99-99", "is not YAML"),
        (read_yaml, "[" * 20_000, "is nested too deeply|is not YAML"),
        (read_yaml, b"\x00", "is not YAML"),
        (read_yaml, b"\xff\xfe\xfd", "is not YAML"),
    ],
)
def test_what_is_wrong(read, content, message, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"'.*file' {message}"):
        read(file)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(PLAIN)
def test_plain_values_come_back(tmp_path_factory, value) -> None:
    file = tmp_path_factory.mktemp("documents") / "file"
    file.write_text(json.dumps(value), encoding="utf-8-sig")  # as Windows programs write it
    assert read_json(file) == value
    file.write_text(yaml.safe_dump(value), encoding="utf-8")
    assert read_yaml(file) == value


def test_what_is_kept(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text('[{"a": 1}, {"b": {"a": 2}}]')
    assert read_json(file, keep=lambda x: x.get("a", x)) == [1, {"b": 2}]
