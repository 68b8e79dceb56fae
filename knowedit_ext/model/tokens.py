"""Text to tokens: the one place that calls the tokenizer.

`EditableModel.bos` says which special tokens stand in front: None: those that the tokenizer puts there itself; True:
its beginning-of-sequence token; False: none. What a text spells itself (a chat template's output) is not doubled.
"""

from __future__ import annotations

from collections.abc import Sequence

from .load import EditableModel

Offsets = list[tuple[int, int]]


def encode(model: EditableModel, text: str) -> tuple[list[int], Offsets]:
    """Token ids and character offsets of `text`, special tokens as `model.bos` asks; trailing ones never."""
    out = model.tokenizer(
        text,
        add_special_tokens=model.bos is not False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    front, own = _split(model, out["input_ids"], out["special_tokens_mask"])
    _check_embedded(model, out["input_ids"][own])
    return front + out["input_ids"][own], [(0, 0)] * len(front) + [tuple(o) for o in out["offset_mapping"][own]]


def encode_all(model: EditableModel, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
    """Token ids of each text, as by `encode`, cut to `max_length`. A text without a token of its own gives none."""
    if not texts:
        return []
    out = model.tokenizer(
        list(texts),
        add_special_tokens=model.bos is not False,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    sequences = []
    for ids, added in zip(out["input_ids"], out["special_tokens_mask"], strict=True):
        front, own = _split(model, ids, added)
        _check_embedded(model, ids[own])
        sequences.append((front + ids[own])[:max_length] if ids[own] else [])
    return sequences


def encode_part(model: EditableModel, text: str) -> list[int]:
    """Token ids of a text that is to stand behind another: no special tokens but those it spells."""
    ids = list(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    _check_embedded(model, ids)
    return ids


def split_bos(model: EditableModel, text: str) -> tuple[str, str]:
    """The beginning-of-sequence token that a text spells out at its beginning ("" where it does not), and the rest."""
    bos = model.tokenizer.bos_token
    return (bos, text[len(bos) :]) if bos and text.startswith(bos) else ("", text)


def token_span(offsets: Offsets, start: int, stop: int) -> tuple[int, int]:
    """(first, after) of the tokens that overlap the characters [start, stop)."""
    inside = [n for n, (first, after) in enumerate(offsets) if first < stop and after > start and after > first]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _check_embedded(model: EditableModel, ids: Sequence[int]) -> None:
    rows = model.modules.embedding.weight.shape[0]
    if ids and max(ids) >= rows:
        token = model.tokenizer.convert_ids_to_tokens(max(ids))
        raise ValueError(
            f"token {max(ids)} ({token!r}) is beyond the {rows} rows of the model's embedding: it was added to the "
            "tokenizer alone; leave it out, or model.resize_token_embeddings and train it"
        )


def _split(model: EditableModel, ids: list[int], added: list[int]) -> tuple[list[int], slice]:
    """The special tokens to put in front, and which ids are the text's own. added: 1 for each the tokenizer added."""
    bos = model.tokenizer.bos_token_id
    first = added.index(0) if 0 in added else len(added)
    after = len(added) - added[::-1].index(0) if 0 in added else first
    front, own = (ids[:first] if first < after else []), ids[first:after]
    if own[: len(front)] == front:
        front = []
    elif own[0] == bos:
        front = [token for token in front if token != bos]
    if model.bos and (front + own)[:1] != [bos]:
        front = [bos, *front]
    return front, slice(first, after)
