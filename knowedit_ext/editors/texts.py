"""Token ids with what is scored in them, and the gradient's rows that a learned editor reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.facts import tokenize_fact
from ..model.head import final_states, log_probabilities
from ..model.load import EditableModel
from ..sweep.module_rows import Rows, module_rows
from ..sweep.packed import PackedPrompts
from .frozen import Frozen
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
        """What has to be run for the scored tokens: nothing behind them. ValueError where none is."""
        if not self.scored:
            raise ValueError(
                f"no token of a text of {len(self.ids)} is scored: a label must stand behind the first one"
            )
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


class Scored:
    """Where scored tokens stand in packed rows, and the weight of each in its group's mean.

    numbered: by group, (number of the packed prompt, text).
    """

    def __init__(self, packed: PackedPrompts, numbered: Sequence[Sequence[tuple[int, Text]]]) -> None:
        rows, tokens, groups = [], [], []
        for group, texts in enumerate(numbered):
            for number, text in texts:
                for at, token in text.scored:
                    rows.append(packed.row(number, at))
                    tokens.append(token)
                    groups.append(group)
        self.rows, self.tokens, self.groups = map(torch.tensor, (rows, tokens, groups))
        self.shares = 1.0 / torch.bincount(self.groups)[self.groups]

    def nll(self, model: EditableModel, states: torch.Tensor) -> torch.Tensor:
        """Mean -log p of each group's tokens [groups], from rows behind the final norm; differentiable."""
        logp = log_probabilities(model, states[self.rows.to(states.device)], self.tokens)
        groups = int(self.groups.max()) + 1
        return -logp.new_zeros(groups).index_add(0, self.groups.to(logp.device), logp * self.shares.to(logp))


def gradient_rows(
    model: EditableModel,
    groups: Sequence[Sequence[Text]],
    weights: Sequence[EditedWeight],
    frozen: Frozen | None = None,
) -> list[Rows]:
    """Of each group of texts, by weight (module input, gradient at its output), a row a token.

    The loss is the mean over a group's scored tokens; rows of different groups never mix. frozen: of the lowest edited
    layer, where texts come again.
    """
    first = min(weight.layer for weight in weights)
    texts = [text for group in groups for text in group]
    packed, hidden = (frozen or Frozen(model, first)).packed([text.run for text in texts])
    numbers = iter(range(len(texts)))
    scored = Scored(packed, [[(next(numbers), text) for text in group] for group in groups])
    counts = [sum(len(text.run) for text in group) for group in groups]

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return scored.nll(model, final_states(model, hidden)).sum()

    _, gathered = module_rows(packed, hidden, first, {weight.name: weight.module_in(model) for weight in weights}, loss)
    split = {name: [side.float().split(counts) for side in sides] for name, sides in gathered.items()}
    return [{name: (x[n], delta[n]) for name, (x, delta) in split.items()} for n in range(len(groups))]
