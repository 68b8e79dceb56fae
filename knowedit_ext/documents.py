"""JSON and YAML files that people hand in: read as a whole, or an error that names the file and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

PARAMETER_FILES = (".json", ".yaml", ".yml")
LINES = (".jsonl", ".ndjson", ".jsonlines")  # what files of JSON lines are called


def read_json(path: str | Path, keep: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The content of a JSON file. keep: what to keep of each object, as soon as it has been read.

    Raises ValueError for what is no JSON, for NaN and infinities, and for a key that an object has twice.
    """

    with _named(path, "JSON"):
        return _loads(Path(path).read_text(encoding="utf-8-sig"), keep)


def read_json_lines(path: str | Path, keep: Callable[[dict[str, Any]], Any] | None = None) -> list[Any]:
    """The values of a file that holds one a line (JSON lines); empty lines do not count. Errors name the line."""
    values = []
    with Path(path).open(encoding="utf-8-sig") as file, _named(path, "JSON lines"):
        for number, line in enumerate(file, 1):
            try:
                values += [_loads(line, keep)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return values


def holds_lines(path: str | Path) -> bool:
    """Is a file JSON lines: by its name, or because its first line is a whole object and others follow?"""
    if Path(path).suffix.lower() in LINES:
        return True
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            if not (first := next((line for line in file if line.strip()), "")).lstrip().startswith("{"):
                return False
            return any(line.strip() for line in file) and isinstance(_loads(first), dict)
    except (ValueError, RecursionError):
        return False


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file: plain values only, and no key twice; else ValueError."""
    with _named(path, "YAML"):
        return yaml.load(Path(path).read_text(encoding="utf-8-sig"), _PlainLoader)


@contextmanager
def _named(path: str | Path, language: str) -> Iterator[None]:
    try:
        yield
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else error
        raise ValueError(f"'{path}' is not {language}: {reason}") from error
    except RecursionError:
        raise ValueError(f"'{path}' is nested too deeply") from None


def _loads(content: str, keep: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    def made(pairs: list[tuple[str, Any]]) -> Any:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError(f"an object has the key '{_repeated([key for key, _ in pairs])}' twice")
        return entries if keep is None else keep(entries)

    return json.loads(content, object_pairs_hook=made, parse_constant=_refuse_constant)


class _PlainLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, f"the key '{_repeated(keys)}' twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _repeated(keys: list[str]) -> str:
    return next(key for n, key in enumerate(keys) if key in keys[:n])


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
