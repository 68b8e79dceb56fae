"""A request as the model reads it: tokenised once, for what is said today, for its keys and for its value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..model.facts import TokenizedFact, tokenize_fact
from ..model.load import EditableModel
from ..model.tokens import split_bos
from .request import EditRequest, lookup


@dataclass(frozen=True)
class TokenizedRequest:
    """facts: the prompt with its target in each context, the bare one first; lookups: the token of each whose key is
    edited."""

    request: EditRequest
    facts: tuple[TokenizedFact, ...]
    lookups: tuple[int, ...]


def tokenize_requests(
    model: EditableModel, requests: Sequence[EditRequest], contexts: Sequence[str], fact_token: str
) -> list[TokenizedRequest]:
    """contexts: templates with one `{}`. ValueError for prompts that the model cannot take."""
    tokenized = []
    for request in requests:
        bos, prompt = split_bos(model, request.prompt)  # contexts stand behind the one that a prompt begins with
        inner = replace(request, prompt=prompt) if bos else request
        facts = tuple(tokenize_fact(model, inner.fact(bos + split_bos(model, context)[1])) for context in contexts)
        tokenized.append(TokenizedRequest(request, facts, tuple(lookup(fact, fact_token) for fact in facts)))
    return tokenized


def context_weights(groups: Sequence[Sequence[str]]) -> list[float]:
    """A key is the mean of the means of its groups of contexts (compute_ks.py:39-50)."""
    return [1.0 / (len(groups) * len(group)) for group in groups for _ in group]
