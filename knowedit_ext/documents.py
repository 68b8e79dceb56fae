"""JSON and YAML files that people hand in: read as a whole, or an error that names the file and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def read_json(path: str | Path, keep: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The content of a JSON file. keep: what to keep of each object, as soon as it has been read.

    Raises ValueError for what is no JSON, for NaN and infinities, and for a key that an object has twice.
    """

    def made(pairs: list[tuple[str, Any]]) -> Any:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError(f"an object has the key '{_repeated([key for key, _ in pairs])}' twice")
        return entries if keep is None else keep(entries)

    try:
        content = Path(path).read_text(encoding="utf-8-sig")
        return json.loads(content, object_pairs_hook=made, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"'{path}' is nested too deeply") from None


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file: plain values only, and no key twice; else ValueError."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8-sig"), _PlainLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError(f"'{path}' is nested too deeply") from None


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
