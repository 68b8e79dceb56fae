"""`collect_moments`: second moments of many layers' keys in one pass over the text."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from .. import ops
from ..checks import Count, NotNegative, Share, typed
from ..model.families import device_of
from ..model.hooks import at_rest
from ..model.identity import Checksums, differing_weights, fingerprint, tokenizer_hash
from ..model.load import EditableModel
from ..model.tokens import encode_all
from ..runs.ranks import Ranks
from .batches import GROUP, Batch, limited, make_batches
from .checkpoint import Checkpoint, Cursor, differing
from .corpora import Corpus, add_text, open_corpus
from .forward import key_weights, key_width, visit_keys
from .settled import Settling
from .store import Moment, Moments, load_moment, save_moment
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
        is not collected again; what was collected from something else is an error.
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
    weights, tokenizer = key_weights(model, layers), tokenizer_hash(model.tokenizer)
    folder = None if out is None else Path(out)
    found = _finished(folder, layers, corpus, weights, tokenizer, settings)
    wanted = [layer for layer in layers if layer not in found]
    if not wanted:
        return Moments(found)
    ranks = Ranks()
    begun = settings | {"layers": wanted, "tokenizer": tokenizer}
    begun["weights"] = {str(layer): fingerprint(weights[layer]) for layer in wanted}
    checkpoint = Checkpoint(folder, ranks, begun, checkpoint_seconds)
    settling = Settling(tolerance, {layer: key_width(model, layer) for layer in wanted}) if stop else None
    run = _Pass(model, corpus, wanted, settings, ranks, checkpoint, settling)
    ended = run.go(progress and ranks.first)
    origin = {"model": model.name, "tokenizer": tokenizer, "settings": settings}
    origin["texts"] = [
        {"sha256": run.cursor.sha256, "texts": run.cursor.texts, "tokens": run.cursor.tokens, "ended": ended}
    ]
    for layer in wanted:
        mean = symmetric(ranks.total(run.sums.pop(layer)).div_(run.cursor.tokens)).cpu()
        missing = settling.missing.get(layer) if settling else None
        found[layer] = Moment(layer, mean, run.cursor.tokens, origin | {"weights": weights[layer]}, missing)
        if folder is not None and ranks.first:
            save_moment(folder, found[layer])
    ranks.wait()
    checkpoint.remove()
    return Moments(found)


def _layers(model: EditableModel, layers: Sequence[int]) -> list[int]:
    layers = sorted(set(layers))
    if not layers:
        raise ValueError("no layers to collect moments of")
    for layer in layers:
        if not 0 <= layer < model.num_layers:
            raise ValueError(f"layer {layer} is outside the model's 0..{model.num_layers - 1}")
    return layers


def _finished(
    folder: Path | None,
    layers: Sequence[int],
    corpus: Corpus,
    weights: Mapping[int, Checksums],
    tokenizer: str,
    settings: Mapping[str, Any],
) -> dict[int, Moment]:
    """The layers that are in `folder` already; ValueError where they are of something else."""
    found: dict[int, Moment] = {}
    hashes: dict[int, str] = {}
    for layer in layers:
        if folder is None or not (folder / f"layer_{layer}.json").exists():
            continue
        moment = load_moment(folder, layer)
        origin, said = moment.origin or {}, ""
        if not origin or len(origin["texts"]) != 1:
            said = "moments that were merged, or of unknown origin"
        else:
            said = differing(origin["settings"], settings)
            said = said or "; ".join(differing_weights(origin["weights"], weights[layer])[:3])
            said = said or ("another tokenizer" if origin["tokenizer"] != tokenizer else "")
            text = origin["texts"][0]
            used = text["texts"]
            if not said and used <= len(corpus) and used not in hashes:
                hashes[used] = corpus.sha256(used)
            longer = text["ended"] == "text" and used != len(corpus)
            said = said or ("another text" if longer or hashes.get(used) != text["sha256"] else "")
        if said:
            raise ValueError(f"'{folder}' holds moments of layer {layer} from something else ({said})")
        found[layer] = moment
    return found


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
        ended = "text"
        with bar:
            for texts in self.corpus.groups(GROUP, self.cursor.text):
                batches, used = self._plan(texts)
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
                    break
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
        begun = self.checkpoint.load()
        checks = begun[2]["checks"] if begun and self.settling else 0
        if self.settling and not self.ranks.agree(checks):
            logger.warning("the ranks' checkpoints are not of one moment: beginning again")
            begun = None
        if begun is None:
            return
        cursor, tensors, more = begun
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

    def _plan(self, texts: list[str]) -> tuple[list[Batch], int]:
        """The batches of the current group, and how many of its texts they take."""
        ids = encode_all(self.model, texts, self.settings["max_length"])
        limit = self.settings["max_tokens"]
        ids = limited(ids, None if limit is None else limit - self.cursor.before)
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
