"""Texts to collect moments over: a list, a file, a folder of files, or a data set by name."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from ..documents import read_json
from ..extras import MissingExtraError, require
from ..world.store import WORLD, load_world

# Short names of the data sets that the published code collects over, as the hub calls them today.
DATASETS = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
_SUFFIXES = (".txt", ".jsonl", ".json")


class Corpus:
    """Texts in a fixed order: `texts[i]` is read when it is asked for.

    shuffle: seed of a permutation of the whole (`random.Random(seed)`, as the published code takes its sample);
    max_texts: only the first so many, after shuffling.
    """

    def __init__(self, texts: Sequence[Any], max_texts: int | None = None, shuffle: int | None = None) -> None:
        if max_texts is not None and max_texts < 1:
            raise ValueError(f"max_texts is {max_texts}: expected at least 1")
        order: Sequence[int] = range(len(texts))
        if shuffle is not None:
            order = list(order)
            random.Random(shuffle).shuffle(order)
        self._texts, self._order = texts, order[:max_texts]
        if not self._order:
            raise ValueError("there is no text to collect moments over")

    def __len__(self) -> int:
        return len(self._order)

    def groups(self, size: int, first: int = 0) -> Iterator[list[str]]:
        """Consecutive texts, `size` at a time, from text `first` on."""
        for start in range(first, len(self), size):
            yield [self[i] for i in range(start, min(start + size, len(self)))]

    def __getitem__(self, number: int) -> str:
        return _text_of(self._texts[self._order[number]], f"text {self._order[number]}")

    def sha256(self, count: int) -> str:
        """Hash of the first `count` texts and of where each ends."""
        digest = hashlib.sha256()
        for number in range(count):
            add_text(digest, self[number])
        return digest.hexdigest()


def add_text(digest: Any, text: str) -> None:
    """Extend a running hash of texts by one."""
    data = text.encode("utf-8", "surrogatepass")
    digest.update(len(data).to_bytes(8, "little") + data)


def open_corpus(texts: str | Path | Iterable[str], max_texts: int | None = None, shuffle: int | None = None) -> Corpus:
    """The texts that `texts` means.

    An iterable of strings; a file (`.json`: a list of strings or of records with "text"; `.jsonl`: one of these a line;
    anything else: a text a line, empty lines left out); a folder (its .txt, .jsonl and .json files, sorted by path); or
    the name of a data set for the `datasets` library, "name" or "name:config", its "train" split ("wikipedia" and
    "wikitext" are short for the ones that published moments are of; "world": the built-in world's statements).
    """
    if isinstance(texts, (str, Path)):
        if str(texts) == WORLD:
            return Corpus(load_world().statements(), max_texts, shuffle)
        path = Path(texts)
        if os.path.isdir(path):  # unlike Path.is_dir, False for what is no path at all
            files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
            if not files:
                raise ValueError(f"folder '{path}' has no {', '.join(_SUFFIXES)} file")
            return Corpus([text for file in files for text in _read(file)], max_texts, shuffle)
        if os.path.isfile(path):
            return Corpus(_read(path), max_texts, shuffle)
        return Corpus(_by_name(str(texts)), max_texts, shuffle)
    if isinstance(texts, (Mapping, bytes)) or not isinstance(texts, Iterable):
        raise ValueError(f"texts are {brief(texts)}: expected a list of texts, a file, a folder or a data set's name")
    if not isinstance(texts, Sequence):
        texts = list(texts)
    return Corpus(texts, max_texts, shuffle)


def _text_of(item: Any, where: str) -> str:
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise ValueError(f'{where} is {type(item).__name__}: expected a string, or a record with a string "text"')
    return text


def _read(path: Path) -> list[str]:
    if path.suffix == ".json":
        content = read_json(path)
        if not isinstance(content, list):
            raise ValueError(f"'{path}' holds {type(content).__name__}: expected a list of texts")
        return [_text_of(item, f"'{path}' item {n}") for n, item in enumerate(content)]
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 text: {error}") from error
    lines = content.splitlines() if path.suffix == ".jsonl" else content.split("\n")
    kept = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        return [_text_of(_json(line, f"'{path}' line {n}"), f"'{path}' line {n}") for n, line in kept]
    return [line for _, line in kept]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from error


def check_name(texts: str) -> None:
    """`MissingExtraError` where `texts` can only be the name of a data set, and there is nothing to load one with."""
    if str(texts) != WORLD and not Path(texts).exists():
        try:
            require("datasets")
        except MissingExtraError as error:
            raise MissingExtraError(
                f"'{texts}' is neither a file nor a folder; to load a data set by that name install the datasets "
                f"library: {error}"
            ) from error


def _by_name(name: str) -> Sequence[Any]:
    check_name(name)
    from datasets import load_dataset

    dataset, _, config = name.partition(":")
    if not config:
        dataset, config = DATASETS.get(dataset, (dataset, ""))
    else:
        dataset = DATASETS.get(dataset, (dataset,))[0]
    split = load_dataset(dataset, *([config] if config else []), split="train")
    if "text" not in split.column_names:
        raise ValueError(f"data set '{name}' has no column 'text': {', '.join(split.column_names)}")
    return split
