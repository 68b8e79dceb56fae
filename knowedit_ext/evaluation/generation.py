"""Text that goes on from a prompt: top-k sampling, every text by a random stream of its own."""

from __future__ import annotations

import hashlib
import inspect
import unicodedata
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from ..model.forward import own_forward
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..model.tokens import encode_all
from ..sweep.engine import free_bytes, row_bytes
from ..sweep.whole import mixes_whole
from .room import make_room

MAX_LENGTH, TOP_K = 100, 5  # test_generation and generate_fast, as published
BEST_BATCH = {"cpu": 64}  # more texts at once bring no speed once the matrices are read from cache
WIDE_BATCH = 512


class RowEdits(Protocol):
    """Many edited models in one batch: inside `rows(index)` sequence b of a forward has edit index[b], -1 none."""

    def rows(self, index: torch.Tensor) -> AbstractContextManager[Any]: ...


@dataclass
class _Text:
    """ids grow from the prompt's; uniforms [tokens to come]: one for each; edit: -1 where there is none."""

    ids: list[int]
    uniforms: np.ndarray
    edit: int
    drawn: int = 0
    ended: bool = False

    def draw(self) -> float:
        """The random number for the next token; nothing depends on it once the text has ended."""
        return 0.5 if self.ended else float(self.uniforms[self.drawn])

    def append(self, token: int, last: int | None) -> None:
        self.ids.append(token)
        self.drawn += 1
        self.ended = self.drawn == len(self.uniforms) or token == last


def record_seed(case_id: int | str, number: int) -> int:
    """The seed of a record's text `number`: the same on every machine, in every run, wherever the record stands."""
    return int.from_bytes(hashlib.blake2b(f"{case_id}/{number}".encode(), digest_size=8).digest(), "big")


@at_rest
def generate(
    model: EditableModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    max_length: int = MAX_LENGTH,
    top_k: int = TOP_K,
    batch: int | None = None,
    edits: RowEdits | None = None,
    index: Sequence[int] | None = None,
    stop_at_eos: bool = False,
    progress: bool = False,
) -> list[str]:
    """Prompts with their continuations, sampled from the `top_k` likeliest tokens (util/generate.py: generate_fast).

    prompts, seeds: one seed a text, see `record_seed`; several texts of one prompt are the prompt several times.
    max_length: tokens of a text, its prompt's included; a prompt that has as many comes back as it is.
    batch: texts at once; None: what free memory holds.
    edits, index: many edited models at once (`editing.rows.EditedRows`) and for each prompt the number of its edit, -1
        for none.
    stop_at_eos: end a text at the tokenizer's end-of-sequence token. The published code goes on behind it, as into the
        next document, and so does the default.

    Each text draws one number a token from its own PCG64(seed) and takes the token where the cumulated probability of
    the `top_k` tokens, in the order of their numbers, passes it. Batches differ in rounding; where that could tip the
    choice, it is made from a run of that text alone. So in float32 and float64 a text depends on model, prompt, seed,
    not on the batch, the order or what was done before; in half precision rounding is too coarse for that, and only
    equal batches give equal texts.

    Special tokens are left out; then, as published, text is normalised (NFKD) and an empty line becomes a space.
    Raises ValueError for prompts without a token, lengths the model has no positions for, logits that are not finite.
    """
    last = _check(model, max_length, top_k, batch, edits, index, stop_at_eos)
    texts = _texts(model, prompts, seeds, max_length, index)
    _write(_Writer(model, max_length, top_k, edits, last), texts, batch, progress)
    return [_readable(model, text.ids) for text in texts]


@at_rest
def continuations(model: EditableModel, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """The `tokens` tokens behind each prompt of token ids, always the likeliest; fewer where the model has no more
    positions."""
    most = model.modules.max_positions
    room = [tokens if most is None else max(0, min(tokens, most - len(ids))) for ids in prompts]
    texts = [_Text(list(ids), np.zeros(n), -1, ended=not n) for ids, n in zip(prompts, room, strict=True)]
    longest = max((len(ids) + n for ids, n in zip(prompts, room, strict=True)), default=0)
    _write(_Writer(model, longest, 1, None, None), texts)
    return [text.ids[len(ids) :] for text, ids in zip(texts, prompts, strict=True)]


def _write(writer: _Writer, texts: Sequence[_Text], batch: int | None = None, progress: bool = False) -> None:
    waiting = sorted((text for text in texts if not text.ended), key=lambda text: -len(text.ids))
    if not waiting:
        return
    size = batch or batch_size(writer.model, len(waiting[0].ids), writer.max_length)
    whole = mixes_whole(writer.model.modules)
    groups = [list(g) for _, g in groupby(waiting, key=lambda text: len(text.ids))] if whole else [waiting]
    with tqdm(total=sum(len(t.uniforms) for t in waiting), unit="token", disable=not progress) as bar:
        for group in groups:
            for start in range(0, len(group), size):
                (writer.write_whole if whole else writer.write)(group[start : start + size], bar)


def _texts(
    model: EditableModel, prompts: Sequence[str], seeds: Sequence[int], max_length: int, index: Sequence[int] | None
) -> list[_Text]:
    if isinstance(prompts, str):
        raise TypeError("prompts is one string: expected a list of them")
    for name, given in (("seeds", seeds), ("edit numbers", index)):
        if given is not None and len(given) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(given)} {name}: expected one a prompt")
    texts = []
    for number, ids in enumerate(encode_all(model, prompts)):
        if not ids:
            raise ValueError(f"prompt {number} ({prompts[number]!r}) has no token to go on from")
        uniforms = np.random.Generator(np.random.PCG64(seeds[number])).random(max(0, max_length - len(ids)))
        texts.append(_Text(ids, uniforms, -1 if index is None else int(index[number]), ended=not len(uniforms)))
    return texts


def _check(
    model: EditableModel,
    max_length: int,
    top_k: int,
    batch: int | None,
    edits: RowEdits | None,
    index: Sequence[int] | None,
    stop_at_eos: bool,
) -> int | None:
    """Raises for settings that make no sense; returns the token at which texts end, if there is one."""
    for name, value in dict(max_length=max_length, top_k=top_k, batch=batch).items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
    most = model.modules.max_positions
    if most is not None and max_length > most:
        raise ValueError(f"max_length is {max_length}, but the model has {most} positions")
    if (edits is None) != (index is None):
        raise ValueError("edits and index belong together: the edits, and the number of one for each prompt")
    last = model.tokenizer.eos_token_id if stop_at_eos else None
    if stop_at_eos and last is None:
        raise ValueError("stop_at_eos, but the tokenizer has no end-of-sequence token")
    return last


@dataclass(frozen=True)
class _Writer:
    """Writes texts to their end; `last` is the token at which one ends early."""

    model: EditableModel
    max_length: int
    top_k: int
    edits: RowEdits | None
    last: int | None

    @property
    def cache_name(self) -> str:
        """What the model's forward calls the cache it takes and gives ("past_key_values" before transformers 5.24)."""
        return "cache" if "cache" in inspect.signature(self.model.hf.forward).parameters else "past_key_values"

    def write(self, texts: list[_Text], bar: tqdm) -> None:
        """One batch, with a cache of keys and values, padded on the left."""
        width, to_come = max(len(text.ids) for text in texts), max(len(text.uniforms) for text in texts)
        tokens = torch.tensor([[text.ids[0]] * (width - len(text.ids)) + text.ids for text in texts])
        padding = torch.tensor([[width - len(text.ids)] for text in texts])
        mask = (torch.arange(width + to_come) >= padding).long().to(self.model.device)  # of all columns to come
        logits, cache = self._forward(texts, tokens, mask[:, :width], None)
        make_room(cache, to_come)
        while True:
            for text, token in zip(texts, self._choose(texts, logits), strict=True):
                if not text.ended:
                    text.append(token, self.last)
                    bar.update(1 + (len(text.uniforms) - text.drawn if text.ended else 0))
            going = [row for row, text in enumerate(texts) if not text.ended]
            if not going:
                return
            if 2 * len(going) <= len(texts):  # sooner, copying the cache would cost more than the idle rows
                texts, kept = [texts[row] for row in going], torch.tensor(going)
                mask = mask[kept]
                cache.batch_select_indices(kept)
            tokens, width = torch.tensor([[text.ids[-1]] for text in texts]), width + 1
            logits, _ = self._forward(texts, tokens, mask[:, :width], cache)

    def write_whole(self, texts: list[_Text], bar: tqdm) -> None:
        """One batch of equal lengths, without a cache or padding: what states and convolutions make of them differs."""
        while texts:
            logits, _ = self._forward(texts, torch.tensor([text.ids for text in texts]), None, None)
            for text, token in zip(texts, self._choose(texts, logits), strict=True):
                text.append(token, self.last)
                bar.update(1 + (len(text.uniforms) - text.drawn if text.ended else 0))
            texts = [text for text in texts if not text.ended]

    def _forward(
        self, texts: list[_Text], tokens: torch.Tensor, mask: torch.Tensor | None, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """Logits [texts, vocab] behind `tokens` [texts, new tokens], and the cache; without a mask none is kept."""
        named = dict(use_cache=False)
        if mask is not None:
            # A text that has ended stays within the model's positions until it leaves the batch.
            positions = (mask.cumsum(1) - 1).clamp(0, self.max_length - 1)[:, -tokens.shape[1] :]
            named = dict(attention_mask=mask, position_ids=positions)
            named = {name: value.to(self.model.device) for name, value in named.items()}
            named |= {self.cache_name: cache, "use_cache": True}
        index = torch.tensor([text.edit for text in texts])
        with nullcontext() if self.edits is None else self.edits.rows(index):
            # By its number: last rows of several texts, as a slice, torch would multiply with the head text by text.
            last = torch.tensor([tokens.shape[1] - 1])
            out = own_forward(self.model, tokens, logits_to_keep=last, **named)
        return out.logits[:, -1], getattr(out, self.cache_name, None)

    def _choose(self, texts: list[_Text], logits: torch.Tensor) -> list[int]:
        """The next token of each text."""
        values, tokens = logits.topk(min(self.top_k + 1, logits.shape[1]), dim=1)
        uniforms = np.array([text.draw() for text in texts])
        chosen, margin = pick(values.double().cpu().numpy(), tokens.cpu().numpy(), uniforms, self.top_k)
        for row in np.flatnonzero(margin < _tolerance(logits.dtype)):
            if not texts[row].ended:
                chosen[row] = self._choose_alone(texts[row])
        return chosen.tolist()

    def _choose_alone(self, text: _Text) -> int:
        """The next token by a run of this text by itself, without a cache: by what its ids alone decide."""
        logits, _ = self._forward([text], torch.tensor([text.ids]), None, None)
        values, tokens = logits.double().cpu().sort(descending=True, stable=True)  # of equals the lower number first
        chosen, _ = pick(values.numpy(), tokens.numpy(), np.array([text.draw()]), self.top_k)
        return int(chosen[0])


def pick(values: np.ndarray, tokens: np.ndarray, uniforms: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of the cumulated probability of the top k tokens, and how far off another choice was.

    values: float64 [texts, k or more], logits in falling order; tokens: their numbers; uniforms: [texts] in [0, 1).
    Returns the chosen tokens [texts] and a margin [texts]: the distance to the nearest step of the cumulated
    probability, or from the k-th logit to the next, whichever is less. The tokens stand in the order of their numbers,
    so near ties among them that change places change nothing. Raises ValueError for logits that are not finite.
    """
    k = min(top_k, values.shape[1])
    if not np.isfinite(values[:, :k]).all():
        raise ValueError("the model's logits are not finite: nothing can be sampled from them")
    order = tokens[:, :k].argsort(axis=1)
    ids = np.take_along_axis(tokens[:, :k], order, axis=1)
    weights = np.take_along_axis(np.exp(values[:, :k] - values[:, :1]), order, axis=1)
    steps = (weights.cumsum(axis=1) / weights.sum(axis=1, keepdims=True))[:, :-1]
    slot = (uniforms[:, None] >= steps).sum(axis=1)
    to_step = np.abs(uniforms[:, None] - steps).min(axis=1, initial=np.inf)
    to_next = (values[:, k - 1 : k] - values[:, k : k + 1]).min(axis=1, initial=np.inf)
    return np.take_along_axis(ids, slot[:, None], axis=1)[:, 0], np.minimum(to_step, to_next)


def _tolerance(dtype: torch.dtype) -> float:
    """A margin that rounding does not reach; 0 where it would reach most."""
    return 1024 * torch.finfo(dtype).eps if dtype in (torch.float32, torch.float64) else 0.0


def batch_size(model: EditableModel, longest: int, max_length: int) -> int:
    """Texts whose cache, prompts and logits take half of the free memory, at most what still brings speed."""
    config = model.modules.config
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or model.hidden_size // heads
    width *= getattr(config, "num_key_value_heads", None) or heads
    cache = 2 * model.num_layers * width * model.dtype.itemsize * max_length
    each = 2 * cache + longest * row_bytes(model) + 8 * config.vocab_size
    best = BEST_BATCH.get(model.device.type, WIDE_BATCH)
    return max(1, min(best, free_bytes(model.device) // 2 // each))


def _readable(model: EditableModel, ids: list[int]) -> str:
    text = unicodedata.normalize("NFKD", model.tokenizer.decode(ids, skip_special_tokens=True))
    return text.replace("\n\n", " ").replace("<|endoftext|>", "")
