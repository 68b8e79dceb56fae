"""Which facts does a model know? Those that are traced and edited in Hase et al. 2023 (tracing.py: the filter)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import Count, NotNegative, typed
from ..datasets.questions import TokenizedQuestion
from ..model.facts import Fact, TokenizedFact, tokenize_fact
from ..model.hooks import at_rest
from ..model.load import EditableModel
from .generation import continuations
from .nll import score


@dataclass(frozen=True)
class KnownFact:
    """known: the target is in what the model goes on to say, and likely enough. said: its greedy continuation;
    probability: of the target, the product over its tokens."""

    known: bool
    said: str
    probability: float


@typed
def known_fact(model: EditableModel, fact: Fact, tokens: Count = 36, least: NotNegative = 0.02) -> KnownFact:
    """Does the model know a fact: is its target, in lower case, part of the `tokens` that it says behind the prompt
    when it always takes the likeliest, and is the target's probability at least `least`?

    Raises ValueError for a fact without a target.
    """
    return known_facts(model, [fact], tokens, least)[0]


@at_rest
def known_facts(model: EditableModel, facts: Sequence[Fact], tokens: int = 36, least: float = 0.02) -> list[KnownFact]:
    """`known_fact` of many, in few passes."""
    for fact in facts:
        if fact.target is None:
            raise ValueError(f"fact '{fact.text}' has no target: whether it is known cannot be said")
    tokenized = [tokenize_fact(model, fact) for fact in facts]
    texts = continuations(model, [each.ids for each in tokenized], tokens)
    scores, _ = score(model, [_question(each) for each in tokenized])
    results = []
    for fact, ids, ((answer,)) in zip(facts, texts, scores, strict=True):
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        probability = answer.probability
        known = fact.target.strip().lower() in text.lower() and probability >= least
        results.append(KnownFact(known, text, probability))
    return results


def _question(fact: TokenizedFact) -> TokenizedQuestion:
    return TokenizedQuestion(fact.ids, (fact.ids + fact.target_ids,), (len(fact.ids),))
