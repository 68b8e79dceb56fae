"""Noise on a subject's embeddings as a part of what is asked: an edit, or an evaluation, under a corrupted input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from reprlib import repr as brief
from typing import Any

import numpy as np

from ..checks import Count, NotNegative, Seed, as_type, read_fields
from ..model.facts import TokenizedFact
from ..model.load import EditableModel
from ..sweep.capture import EmbeddingNoise
from .corruption import Noise, noise_of

TEXT_RULES = ("m", "t")  # of `noise_level`: they take the spread of texts, which a request has none of


@dataclass(frozen=True)
class SubjectNoise:
    """Normal (or uniform) noise on the embeddings of the subject's tokens.

    level: its size, or a rule such as "s3" over the request's own subject (see `noise_level`, which gives a number for
        the subjects of a whole data set). samples: draws of it, over which is averaged. seed: of the draws; those of a
        prompt are the ones that a trace of it has.
    """

    level: float | str
    samples: Count = 1
    seed: Seed = 1

    def __post_init__(self) -> None:
        level = self.level
        if isinstance(level, str):
            if level[:1] in TEXT_RULES:
                raise ValueError(f"noise level '{level}' needs texts: expected 's3', 'u0.1' or a number")
        else:
            try:
                object.__setattr__(self, "level", as_type("noise level", level, NotNegative))
            except ValueError as error:
                raise ValueError(f"{error}, or a rule such as 's3'") from None
        read_fields(self)

    @classmethod
    def of(cls, given: SubjectNoise | Mapping[str, Any] | float | str | None) -> SubjectNoise | None:
        """As it is, from what `to_dict` gave, or from a level alone."""
        if given is None or isinstance(given, SubjectNoise):
            return given
        if isinstance(given, Mapping):
            if not {"level"} <= set(given) <= {"level", "samples", "seed"}:
                raise ValueError(f"noise is {brief(dict(given))}: expected level, and maybe samples and seed")
            return cls(**given)
        if isinstance(given, (Real, str)) and not isinstance(given, bool):
            return cls(given)
        raise ValueError(f"noise is {brief(given)}: expected a SubjectNoise, a number, or a rule such as 's3'")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def resolve(self, model: EditableModel, subject: str) -> Noise:
        """What is drawn for a subject. Raises ValueError for a rule that does not exist."""
        return noise_of(model, self.level, [subject])

    def draws(self, model: EditableModel, tokenized: TokenizedFact) -> list[EmbeddingNoise]:
        """`samples` draws for a prompt, at its own subject."""
        start, after = tokenized.subject_range
        generator = np.random.RandomState(self.seed)  # new for every prompt, as in a trace
        noise = self.resolve(model, tokenized.fact.subject)
        drawn = noise.draw(generator, self.samples, after - start, model.hidden_size)
        return [EmbeddingNoise(start, each) for each in drawn]
