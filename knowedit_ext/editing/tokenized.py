"""A request as the model reads it: tokenised once, for what is said today, for its keys and for its value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..model.facts import TokenizedFact, tokenize_fact
from ..model.load import EditableModel
from ..model.tokens import split_bos
from ..sweep.capture import EmbeddingNoise
from .request import EditRequest, lookup
from .stream import Stream


@dataclass(frozen=True)
class TokenizedRequest:
    """facts: the prompt with its target in each context, the bare one first, each under every draw of noise; lookups:
    the token of each whose key is edited; noises: what is added to each one's embeddings.

    draws: how many facts a context has, each with as much weight. stream: where noise is drawn anew for every pass.
    """

    request: EditRequest
    facts: tuple[TokenizedFact, ...]
    lookups: tuple[int, ...]
    noises: tuple[EmbeddingNoise | None, ...]
    draws: int = 1
    stream: Stream | None = None

    @property
    def bare(self) -> TokenizedRequest:
        """In no context."""
        n = self.draws
        return replace(self, facts=self.facts[:n], lookups=self.lookups[:n], noises=self.noises[:n])

    @property
    def ends_prompt(self) -> bool:
        """Is the key's token the prompt's last, so that what is put there needs no layer to carry it to the end?"""
        return all(at == len(fact.ids) - 1 for fact, at in zip(self.facts, self.lookups, strict=True))

    def inputs(self) -> Sequence[EmbeddingNoise | None]:
        """What is added to the embeddings of each fact in a pass; asked for once a pass."""
        return self.noises if self.stream is None else self.stream.draw(len(self.facts))


def tokenize_requests(
    model: EditableModel,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    fact_token: str,
    compat: str | None = None,
) -> list[TokenizedRequest]:
    """contexts: templates with one `{}`. compat: "hase": noise is drawn as released, see `Stream`. ValueError for
    prompts that the model cannot take."""
    tokenized = []
    for request in requests:
        bos, prompt = split_bos(model, request.prompt)  # contexts stand behind the one that a prompt begins with
        inner = replace(request, prompt=prompt) if bos else request
        facts = [tokenize_fact(model, inner.fact(bos + split_bos(model, context)[1])) for context in contexts]
        noises, draws, stream = [None] * len(facts), 1, None
        if request.noise is not None and compat == "hase":
            stream = Stream.of(model, request.noise, facts[0])
        elif request.noise is not None:
            draws = request.noise.samples
            noises = [noise for fact in facts for noise in request.noise.draws(model, fact)]
            facts = [fact for fact in facts for _ in range(draws)]
        lookups = tuple(lookup(fact, fact_token) for fact in facts)
        tokenized.append(TokenizedRequest(request, tuple(facts), lookups, tuple(noises), draws, stream))
    return tokenized


def context_weights(groups: Sequence[Sequence[str]]) -> list[float]:
    """A key is the mean of the means of its groups of contexts (compute_ks.py:39-50)."""
    return [1.0 / (len(groups) * len(group)) for group in groups for _ in group]


def reaches_end(model: EditableModel, request: EditRequest, layer: int, fact_token: str) -> bool:
    """Can a value that is put out by this layer change what is said behind the prompt? The last layer's can only where
    the key's token is the prompt's last."""
    if layer < model.num_layers - 1:
        return True
    return tokenize_requests(model, [replace(request, noise=None)], ["{}"], fact_token)[0].ends_prompt


def check_drawn_once(requests: Sequence[TokenizedRequest]) -> None:
    """ValueError where values cannot be told from the rest of an edit."""
    if redrawn := next((request for request in requests if request.stream is not None), None):
        raise ValueError(
            f"the noise of '{redrawn.request.subject}' is drawn anew for its value and its key, one behind the other: "
            "values by themselves are not those of an edit"
        )
