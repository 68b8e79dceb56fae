"""`collect_moments`: second moments of many layers' keys in one pass over the text."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from .. import ops
from ..checks import Count, NotNegative, Share, typed
from ..model.families import device_of
from ..model.hooks import at_rest
from ..model.identity import beside, config, fingerprint, tokenizer_hash
from ..model.load import EditableModel
from ..model.tokens import encode_all
from ..runs.lock import alone
from ..runs.ranks import Ranks
from .ahead import ahead
from .batches import GROUP, Batch, limited, make_batches
from .checkpoint import Checkpoint, Cursor
from .corpora import Corpus, add_text, open_corpus
from .finished import finished
from .forward import key_weights, key_width, visit_keys
from .settled import Settling
from .store import Moment, Moments, save_moment
from .triangle import symmetric, unpack

logger = logging.getLogger(__name__)


@at_rest
@typed
def collect_moments(
    model: EditableModel,
    texts: str | Path | Iterable[str],
    layers: Sequence[int],
    max_tokens: Count | None = None,
    out: str | Path | None = None,
    *,
    batch_tokens: Count = 8192,
    max_length: Count | None = None,
    max_texts: Count | None = None,
    shuffle: int | None = None,
    stop: Literal[None, "tolerance"] = None,
    tolerance: Share = 0.1,
    products: Literal["float32", "float64"] = "float32",
    checkpoint_seconds: NotNegative = 60.0,
    progress: bool = True,
) -> Moments:
    """E[k k^T] over the keys k that the down projections of `layers` read, uncentred, one forward pass for all layers.

    texts: a list of strings, a file, a folder, or a data set's name: see `corpora.open_corpus`. Each is cut to the
        model's positions (or `max_length`). Every token counts once, special tokens of the tokenizer included.
    max_tokens: no more keys than that; the text that goes over is cut.
    out: folder for the result. Checkpoints are written there while it goes on (every `checkpoint_seconds`, less often
        where they take long), and a run that was killed at any moment goes on to the same bits. What is finished there
        is not collected again; what was collected from something else is an error, but for a smaller `max_tokens`: a
        larger one goes on from the sums before the last group of texts (1000) to the bits that it would have found at
        once. These sums are kept in `out`, as large as the moments again (not with `stop`).
    batch_tokens: tokens a forward pass, padding included.
    max_texts, shuffle: the first texts only; a seed to shuffle them before that (1 is the published sample).
    stop: "tolerance" ends when the solutions of probe keys have an estimated relative error below `tolerance` for want
        of more text; `moments[layer].missing` is that estimate. None: the whole text.
    products: "float32", summed over a few thousand keys and then added in float64; or "float64" from the beginning.

    Under `torchrun` every rank takes its share of the batches and all return the whole.
    Raises ValueError for layers out of range, text without a token, keys that are not finite.
    """
    layers = _layers(model, layers)
    corpus = open_corpus(texts, max_texts, shuffle)
    positions = [n for n in (max_length, model.modules.max_positions) if n is not None]
    settings = {
        "max_tokens": max_tokens,
        "max_length": min(positions, default=None),
        "batch_tokens": batch_tokens,
        "max_texts": max_texts,
        "shuffle": shuffle,
        "products": products,
        "bos": model.bos,
        "stop": {"tolerance": tolerance, "layers": layers} if stop else None,
    }
    if model.precision is not None:
        settings["precision"] = model.precision
    if beside(model):
        settings["beside"] = beside(model)
    weights = key_weights(model, layers)
    told_by = {"tokenizer": tokenizer_hash(model.tokenizer), "config": config(model)}
    folder, ranks = None if out is None else Path(out), Ranks()
    with nullcontext() if folder is None else alone(folder, ranks):
        moments, renewed = finished(folder, layers, corpus, weights, told_by, settings)
        ranks.wait()  # all have looked at what one of them may write
        for layer in renewed if ranks.first else ():
            save_moment(folder, moments[layer])
        prints = {layer: fingerprint(weights[layer]) for layer in layers}
        checkpoint = Checkpoint(folder, ranks, settings | told_by, prints, checkpoint_seconds)
        wanted = [layer for layer in layers if layer not in moments]
        for part, start in _parts(checkpoint, wanted, layers):
            settling = Settling(tolerance, {layer: key_width(model, layer) for layer in part}) if stop else None
            run = _Pass(model, corpus, part, settings, ranks, checkpoint, settling, start)
            ended = run.go(progress and ranks.first)
            origin = {"model": model.name, **told_by, "settings": settings}
            origin["texts"] = [
                {"sha256": run.cursor.sha256, "texts": run.cursor.texts, "tokens": run.cursor.tokens, "ended": ended}
            ]
            for layer in part:
                mean = symmetric(ranks.total(run.sums.pop(layer)).div_(run.cursor.tokens)).cpu()
                missing = settling.missing.get(layer) if settling else None
                moments[layer] = Moment(layer, mean, run.cursor.tokens, origin | {"weights": weights[layer]}, missing)
                if folder is not None and ranks.first:
                    save_moment(folder, moments[layer])
            ranks.wait()
            checkpoint.remove()
    return Moments(dict(sorted(moments.items())))


def _layers(model: EditableModel, layers: Sequence[int]) -> list[int]:
    layers = sorted(set(layers))
    if not layers:
        raise ValueError("no layers to collect moments of")
    for layer in layers:
        if not 0 <= layer < model.num_layers:
            raise ValueError(f"layer {layer} is outside the model's 0..{model.num_layers - 1}")
    return layers


def _parts(
    checkpoint: Checkpoint, wanted: Sequence[int], asked: Sequence[int]
) -> list[tuple[list[int], Cursor | None]]:
    """Layers that go through the text together, and where their kept sums begin.

    First those that were begun together, the finished among them too: where they end may depend on all of them.
    """
    begun = checkpoint.layers()
    if not set(begun) <= set(asked):
        return [(list(wanted), None)] if wanted else []  # what was begun is an error there
    starts = {layer: checkpoint.kept(layer) for layer in sorted({*begun, *wanted})}
    parts: list[tuple[list[int], Cursor | None]] = []
    for layer in wanted:
        together = next((layers for layers, start in parts if start == starts[layer]), None)
        if layer not in begun and together is not None:
            together.append(layer)
        elif layer not in begun:
            parts.append(([layer], starts[layer]))
    if begun:
        same = all(starts[layer] == starts[begun[0]] for layer in begun)
        parts.insert(0, (begun, starts[begun[0]] if same else None))
    return parts


@dataclass
class _Pass:
    """One pass over the text: sums [d_in, d_in] (lower triangles, float64) and how far it has come."""

    model: EditableModel
    corpus: Corpus
    layers: Sequence[int]
    settings: Mapping[str, Any]
    ranks: Ranks
    checkpoint: Checkpoint
    settling: Settling | None
    start: Cursor | None = None  # where kept sums are gone on from

    def go(self, progress: bool) -> str:
        """From the beginning or the checkpoint to the end; says what ended it."""
        self._begin()
        limit = self.settings["max_tokens"]
        bar = tqdm(
            desc="moments",
            total=limit or len(self.corpus),
            unit="token" if limit else "text",
            unit_scale=True,
            initial=self.cursor.tokens if limit else self.cursor.text,
            disable=not progress,
        )
        start, first = time.monotonic(), self.cursor.tokens
        ended, kept = "text", self.cursor.cut and self.cursor.before > 0
        with bar, closing(ahead(self._tokenized())) as groups:
            for texts, ids in groups:
                before = replace(self.cursor)
                batches, used = self._plan(texts, ids)
                if self.cursor.cut and not before.batch:
                    kept = self._keep(before)
                for number in range(self.cursor.batch, len(batches)):
                    self._step(number, batches[number])
                    bar.update(batches[number].tokens if limit else len(batches[number].ids))
                    rate = (self.cursor.tokens - first) / max(time.monotonic() - start, 1e-9)
                    bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                    if self._settled():
                        ended = "tolerance"
                        break
                    if self.checkpoint.due and not (self.settling and self.ranks.size > 1):
                        self._save()
                if ended == "tolerance":
                    break
                self.cursor.text += used
                self.cursor.before, self.cursor.batch = self.cursor.tokens, 0
                if limit and self.cursor.tokens >= limit:
                    ended = "max_tokens"
                    if not self.cursor.cut:
                        kept = self._keep(self.cursor)
                    break
        if not kept:
            for layer in self.layers:
                self.checkpoint.drop(layer)
        if not self.cursor.tokens:
            raise ValueError("no text has a token: there are no keys to collect")
        logger.info(
            "%d keys of %d layers in %.1f s", self.cursor.tokens - first, len(self.layers), time.monotonic() - start
        )
        return ended

    def _begin(self) -> None:
        self.cursor, self.sums, self._digest = Cursor(), {}, hashlib.sha256()
        for layer in self.layers:
            width = key_width(self.model, layer)
            device = device_of(self.model.modules.down_projection(layer)) or self.model.device
            self.sums[layer] = torch.zeros(width, width, dtype=torch.float64, device=device)
        begun = self.checkpoint.load(self.layers)
        checks = begun[2]["checks"] if begun and self.settling else 0
        if self.settling and not self.ranks.agree(checks):
            logger.warning("the ranks' checkpoints are not of one moment: beginning again")
            begun = None
        if begun is not None:
            cursor, tensors, more = begun
        elif self.start is not None:
            cursor = replace(self.start)
            tensors, more = {f"sum.{layer}": self.checkpoint.kept_sum(layer) for layer in self.layers}, {}
        else:
            return
        if cursor.texts > len(self.corpus) or self.corpus.sha256(cursor.texts) != cursor.sha256:
            raise ValueError("the checkpoint was begun over another text: choose another folder")
        for number in range(cursor.text):
            add_text(self._digest, self.corpus[number])
        for layer, total in self.sums.items():
            total.copy_(unpack(tensors[f"sum.{layer}"], len(total)))
        if self.settling:
            self.settling.restore(tensors, more)
        self.cursor = cursor
        logger.info("going on after %d tokens", cursor.tokens)

    def _keep(self, cursor: Cursor) -> bool:
        """Keep the sums of whole groups for a collection with more tokens. (Where it stops by itself there is none.)"""
        if self.settling is not None or not cursor.before:
            return False
        self.checkpoint.keep(cursor, self.sums)
        return True

    def _tokenized(self) -> Iterator[tuple[list[str], list[list[int]]]]:
        """The groups of texts from the current one on, and the tokens of each text."""
        for texts in self.corpus.groups(GROUP, self.cursor.text):
            yield texts, encode_all(self.model, texts, self.settings["max_length"])

    def _plan(self, texts: list[str], ids: list[list[int]]) -> tuple[list[Batch], int]:
        """The batches of the current group, and how many of its texts they take."""
        limit = self.settings["max_tokens"]
        whole = ids
        ids = limited(ids, None if limit is None else limit - self.cursor.before)
        self.cursor.cut = ids != whole
        for text in texts[: len(ids)]:
            add_text(self._digest, text)
        self.cursor.texts, self.cursor.sha256 = self.cursor.text + len(ids), self._digest.hexdigest()
        return make_batches(ids, self.settings["batch_tokens"], seed=self.cursor.text), len(ids)

    def _step(self, number: int, batch: Batch) -> None:
        """One batch, if it is this rank's."""
        if (self.cursor.text // GROUP + number) % self.ranks.size == self.ranks.rank:
            mask = None if batch.tokens == batch.mask.numel() else batch.mask.flatten()  # [texts * tokens]

            def visit(layer: int, keys: torch.Tensor) -> None:
                keys, keep = keys.flatten(0, 1), None if mask is None else mask.to(keys.device)
                if self.settings["products"] == "float64":
                    keys = keys.double()
                ops.moment_update(self.sums[layer], keys, keep)
                if self.settling and not self.cursor.tokens:
                    self.settling.take_probes(layer, keys if keep is None else keys[keep])

            visit_keys(self.model, batch.ids, self.layers, visit)
            for layer, total in self.sums.items():
                if not bool(total.diagonal().isfinite().all()):
                    raise ValueError(f"keys of layer {layer} are not finite: NaN or infinity in weights or activations")
            self.cursor.count += batch.tokens
        self.cursor.batch = number + 1
        self.cursor.tokens += batch.tokens

    def _settled(self) -> bool:
        if self.settling is None or self.cursor.tokens < self.settling.due:
            return False
        if not self.settling.checks:
            for layer, probe in self.settling.probes.items():
                self.settling.probes[layer] = self.ranks.from_first(probe)
        means = {layer: self.ranks.total(total).cpu() / self.cursor.tokens for layer, total in self.sums.items()}
        done = self.settling.settled(means, self.cursor.tokens)
        done = bool(self.ranks.from_first(torch.tensor(int(done))))
        if self.ranks.size > 1 and not done:
            self._save()  # here all ranks are at one point: only from such can they go on together
        return done

    def _save(self) -> None:
        settling = self.settling
        self.checkpoint.save(
            self.cursor, self.sums, settling.tensors() if settling else {}, settling.numbers() if settling else {}
        )
