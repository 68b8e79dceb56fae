"""Documents packed into training rows, with the attention masks that make names carry their facts."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from .generate import Document

VISIBLE = 1 << 20  # "hidden from nobody": larger than any position
ANSWER_WEIGHT, OTHER_WEIGHT = 1.0, 0.15  # names and the choice of a template cannot be predicted; objects can


@dataclass
class Batch:
    """Rows of packed documents; all tensors are ``[rows, width]`` but the masks."""

    ids: torch.Tensor  # int64
    positions: torch.Tensor  # int64, counted from the start of each document (plus an offset for some)
    weights: torch.Tensor  # float32: the loss weight of predicting this token; 0 for the first of a document
    early_mask: torch.Tensor  # bool [rows, 1, width, width]: True where the query (third) may attend to the key
    late_mask: torch.Tensor  # bool [rows, 1, width, width]


@dataclass
class _Encoded:
    ids: list[int]
    weights: list[float]
    name_end: list[int]  # for a token of a name the index of that name's last token, else VISIBLE


def encode(tokenizer: PreTrainedTokenizerFast, doc: Document, leading_end: bool) -> _Encoded:
    """Tokenise a document, close it with the end-of-text token, and locate names and objects in it."""
    piece = tokenizer.backend_tokenizer.encode(doc.text)
    end = tokenizer.eos_token_id
    ids, offsets = list(piece.ids), list(piece.offsets)
    weights, name_end = [OTHER_WEIGHT] * len(ids), [VISIBLE] * len(ids)

    def tokens_of(span: tuple[int, int]) -> list[int]:
        return [i for i, (a, b) in enumerate(offsets) if a < span[1] and b > span[0]]

    for span in doc.answers:
        for i in tokens_of(span):
            weights[i] = ANSWER_WEIGHT
    for span in doc.names:
        inside = tokens_of(span)
        for i in inside:
            name_end[i] = inside[-1]
    if leading_end:
        ids, weights = [end, *ids], [0.0, *weights]
        name_end = [VISIBLE, *(e if e == VISIBLE else e + 1 for e in name_end)]
    else:
        weights[0] = 0.0  # nothing stands before it
    return _Encoded([*ids, end], [*weights, OTHER_WEIGHT], [*name_end, VISIBLE])


def attention_masks(
    documents: torch.Tensor, name_end: torch.Tensor, hide_whole_names: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks for the early and the late layers from document numbers and name ends, ``[rows, width]`` each.

    Causal and within the document in both. From a query after a name, the name's tokens before its last one are
    hidden in every layer, so that what is known of the subject has to be gathered at its last token. With
    ``hide_whole_names`` the early mask hides the last token as well, so that it is looked up there and not later.
    """
    width = documents.shape[1]
    place = torch.arange(width)
    query, key = place[:, None], place[None, :]
    allowed = (documents[:, :, None] == documents[:, None, :]) & (key <= query)
    after_name = query > name_end[:, None, :]  # [rows, query, key]
    late = allowed & ~(after_name & (key != name_end[:, None, :]))
    early = allowed & ~after_name if hide_whole_names else late
    return early[:, None], late[:, None]


class Batches:
    """Seeded batches of ``rows`` x ``width`` tokens; ``masked`` is the share of documents with names hidden."""

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: PreTrainedTokenizerFast,
        rows: int,
        width: int,
        seed: int,
        masked: float = 0.8,
        hide_whole_names: bool = True,
    ) -> None:
        self.tokenizer, self.rows, self.width = tokenizer, rows, width
        self.masked, self.hide_whole_names = masked, hide_whole_names
        self.rng = random.Random(f"batches {seed}")
        self._documents = iter(documents)
        self._waiting: _Encoded | None = None

    def _next_document(self) -> _Encoded:
        if self._waiting is not None:
            doc, self._waiting = self._waiting, None
            return doc
        while True:
            doc = encode(self.tokenizer, next(self._documents), leading_end=self.rng.random() < 0.25)
            if len(doc.ids) <= self.width:
                return doc

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next()

    def next(self) -> Batch:
        """Pack documents into rows, whole ones only; the rest of a row is padding of weight 0."""
        shape = self.rows, self.width
        ids = torch.full(shape, self.tokenizer.eos_token_id)
        positions, number = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
        weights, name_end = torch.zeros(shape), torch.full(shape, VISIBLE)
        for row in range(self.rows):
            at = 0
            while True:
                doc = self._next_document()
                size = len(doc.ids)
                if at + size > self.width:
                    self._waiting = doc
                    break
                cut = slice(at, at + size)
                # Short documents would leave the later position embeddings untrained: start some further on.
                offset = self.rng.randint(0, self.width - size) if self.rng.random() < 0.2 else 0
                ids[row, cut] = torch.tensor(doc.ids)
                positions[row, cut] = torch.arange(offset, offset + size)
                weights[row, cut] = torch.tensor(doc.weights)
                number[row, cut] = at
                if self.rng.random() < self.masked:
                    name_end[row, cut] = torch.tensor([e if e == VISIBLE else e + at for e in doc.name_end])
                at += size
        return Batch(ids, positions, weights, *attention_masks(number, name_end, self.hide_whole_names))
