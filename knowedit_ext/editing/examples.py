"""What fine-tuning scores: requests as packed rows that enter the lowest trained layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..model.facts import TokenizedFact, tokenize_fact
from ..model.load import EditableModel
from ..model.tokens import encode_part
from ..sweep.capture import EmbeddingNoise, clean_runs
from ..sweep.packed import PackedPrompts
from .request import EditRequest
from .stream import Stream


@dataclass(frozen=True)
class Example:
    """A request as it is run, once for each draw of noise.

    ids: tokens; scored: which targets at which of their positions. weight: of each target's negative log-probability;
    share: of the example in the loss of its batch. draw: what is added to the embeddings of each run, asked for anew in
    every epoch where `redrawn`.
    """

    ids: tuple[int, ...]
    scored: tuple[tuple[int, tuple[int, ...]], ...]  # (position, targets there)
    minimise: bool
    weight: float
    share: float
    draw: Callable[[], Sequence[EmbeddingNoise | None]]
    redrawn: bool


def _example(
    model: EditableModel,
    request: EditRequest,
    fact: TokenizedFact,
    ids: tuple[int, ...],
    scored: Sequence[tuple[int, tuple[int, ...]]],
    size: int,
    compat: str | None,
) -> Example:
    """A mean over a target's tokens and draws (the probability that is minimised is of all its tokens), then over the
    batch; as in google/belief-localization a sum over all of these."""
    noise, whole = request.noise, compat == "hase"
    draws: Sequence[EmbeddingNoise | None] = [None] if noise is None else noise.draws(model, fact)
    draw, redrawn = (lambda: draws), noise is not None and whole
    if redrawn:
        stream = Stream.of(model, replace(noise, samples=1), fact)
        draw = partial(stream.draw, noise.samples)
    weight = 1.0 if whole or request.minimise else 1.0 / sum(len(targets) for _, targets in scored)
    share = 1.0 if whole else 1.0 / (len(draws) * size)
    return Example(ids, tuple(scored), request.minimise, weight, share, draw, redrawn)


def examples_of(model: EditableModel, batch: Sequence[EditRequest], compat: str | None) -> list[Example]:
    examples = []
    for request in batch:
        fact = tokenize_fact(model, request.fact())
        scored = [(len(fact.ids) - 1 + n, (target,)) for n, target in enumerate(fact.target_ids)]
        ids = fact.ids + fact.target_ids[:-1]
        examples.append(_example(model, request, fact, ids, scored, len(batch), compat))
    return examples


def published_examples(model: EditableModel, batch: Sequence[EditRequest], compat: str | None) -> list[Example]:
    """Targets are tokenised alone and padded to the batch's longest; what counts is not padding but what is known."""
    tokenizer, examples = model.tokenizer, []
    unknown = tokenizer.unk_token_id
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    targets = [encode_part(model, request.target_new) for request in batch]
    longest = max(map(len, targets))
    for request, target in zip(batch, targets, strict=True):
        if padding is not None and unknown is not None:
            target = target + [padding] * (longest - len(target))
        known = tuple(token for token in target if token != unknown)
        if not known:
            raise ValueError(f"target '{request.target_new}' of '{request.subject}' has no known token")
        fact = tokenize_fact(model, request.fact(target=False))
        scored = [(len(fact.ids) - 1, known)]
        examples.append(_example(model, request, fact, fact.ids, scored, len(batch), compat))
    return examples


class Batch:
    """Examples as packed rows that enter layer `first`, a run for each draw of noise; weights of the targets' negative
    log-probabilities [rows, k], and the run of each row."""

    def __init__(self, model: EditableModel, examples: Sequence[Example], first: int) -> None:
        self.model, self.examples, self.first = model, examples, first
        self.size = len(examples)
        self.refresh()

    @property
    def redrawn(self) -> bool:
        return any(example.redrawn for example in self.examples)

    @torch.no_grad()
    def refresh(self) -> None:
        """Run what lies below the trained layers, under the draws of noise that it has now."""
        runs = [(n, noise) for n, example in enumerate(self.examples) for noise in example.draw()]
        own = [self.examples[n] for n, _ in runs]
        noises = [noise for _, noise in runs]
        self.packed = PackedPrompts(self.model, clean_runs(self.model, [each.ids for each in own], noises))
        self.hidden = self.packed.run(self.packed.start, 0, self.first)
        scored = [(number, *at) for number, example in enumerate(own) for at in example.scored]
        self.rows = torch.tensor([self.packed.row(number, position) for number, position, _ in scored])
        self.run_of_row = torch.tensor([number for number, *_ in scored])
        self.targets = torch.zeros(len(scored), max(len(targets) for *_, targets in scored), dtype=torch.int64)
        self.weights = torch.zeros(self.targets.shape, dtype=torch.float64)
        for row, (number, _, targets) in enumerate(scored):
            self.targets[row, : len(targets)] = torch.tensor(targets)
            self.weights[row, : len(targets)] = own[number].weight
        self.example_of_run = torch.tensor([n for n, _ in runs])
        self.minimise = torch.tensor([example.minimise for example in own])
        self.shares = torch.tensor([example.share for example in own], dtype=torch.float64)

    def spans(self) -> list[tuple[int, int]]:
        """The first of each example's rows, and the one behind its last."""
        own = self.example_of_run.tolist()
        starts = [self.packed.row(own.index(n), 0) for n in range(self.size)]
        return list(zip(starts, [*starts[1:], self.packed.rows], strict=True))
