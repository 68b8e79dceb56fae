"""Token ids with what is scored in them, and the gradient's rows that a learned editor reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.facts import tokenize_fact
from ..model.head import final_states, log_probabilities
from ..model.load import EditableModel
from ..sweep.capture import clean_runs
from ..sweep.module_rows import Rows, module_rows
from ..sweep.packed import PackedPrompts
from .weights import EditedWeight

NONE = -100  # a label that is not scored


@dataclass(frozen=True)
class Text:
    """labels: as long as ids; a token's own id where it is scored, behind those before it, else -100."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def scored(self) -> list[tuple[int, int]]:
        """(position that it is read at, token)."""
        return [(at - 1, label) for at, label in enumerate(self.labels) if at and label != NONE]

    @property
    def run(self) -> tuple[int, ...]:
        """What has to be run for the scored tokens: nothing behind them."""
        return self.ids[: self.scored[-1][0] + 1]

    @classmethod
    def of_last(cls, ids: Sequence[int], count: int) -> Text:
        """The last `count` tokens are scored."""
        silent = max(0, len(ids) - count)
        return cls(tuple(ids), (NONE,) * silent + tuple(ids[silent:]))


def texts_of(batch: Mapping[str, Any]) -> list[Text]:
    """Of a padded batch: input_ids, attention_mask, labels, [records, tokens] each."""
    texts = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        kept = [n for n, one in enumerate(mask) if int(one)]
        texts.append(Text(tuple(int(ids[n]) for n in kept), tuple(int(labels[n]) for n in kept)))
    return texts


def text_of_request(model: EditableModel, fact: Any) -> Text:
    """Prompt and new target, whose tokens are scored."""
    tokenized = tokenize_fact(model, fact)
    return Text.of_last(tokenized.ids + tokenized.target_ids, len(tokenized.target_ids))


def nll_shares(texts: Sequence[Text], together: bool) -> list[float]:
    """Weight of each scored token's negative log-probability: a mean over all of them, or each text's own mean."""
    counts = [len(text.scored) for text in texts]
    return [1.0 / (sum(counts) if together else count) for count in counts for _ in range(count)]


def scored_rows(packed: PackedPrompts, texts: Sequence[Text]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of the packed matrix, tokens) of all that is scored."""
    scored = [(packed.row(number, at), token) for number, text in enumerate(texts) for at, token in text.scored]
    rows, tokens = zip(*scored, strict=True)
    return torch.tensor(rows), torch.tensor(tokens)


def gradient_rows(
    model: EditableModel, texts: Sequence[Text], weights: Sequence[EditedWeight], together: bool
) -> tuple[Rows, torch.Tensor]:
    """By weight (module input, gradient at its output), a row a token; and each row's text [rows].

    together: the loss is the mean over the scored tokens of all texts; else the sum of each text's mean, and rows of
    different texts never mix.
    """
    packed = PackedPrompts(model, clean_runs(model, [text.run for text in texts]))
    first = min(weight.layer for weight in weights)
    rows, tokens = scored_rows(packed, texts)
    shares = torch.tensor(nll_shares(texts, together))

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        logp = log_probabilities(model, final_states(model, hidden[rows.to(hidden.device)]), tokens)
        return -(logp * shares.to(logp.device)).sum()

    with torch.no_grad():
        hidden = packed.run(packed.start, 0, first)
    _, gathered = module_rows(packed, hidden, first, {weight.name: weight.module_in(model) for weight in weights}, loss)
    return {name: (x.float(), d.float()) for name, (x, d) in gathered.items()}, packed.prompt_of_row
