"""Noise as google/belief-localization draws it under an edit, for `compat="hase"` alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..model.facts import TokenizedFact
from ..model.load import EditableModel
from ..sweep.capture import EmbeddingNoise
from ..tracing.corruption import Noise
from ..tracing.subject_noise import SubjectNoise


@dataclass(frozen=True, eq=False)
class Stream:
    """One random state a request, whose draws go on from pass to pass (experiments/evaluate.py: 342-360).

    Every row of a pass is noised at the tokens that the subject has in the bare prompt, whatever stands there.
    """

    state: np.random.RandomState
    noise: Noise
    start: int
    tokens: int
    hidden: int

    @classmethod
    def of(cls, model: EditableModel, noise: SubjectNoise, bare: TokenizedFact) -> Stream:
        if noise.samples != 1:
            raise ValueError(
                f"noise has {noise.samples} samples: as released (compat='hase') a row has one draw a pass"
            )
        start, after = bare.subject_range
        drawn = noise.resolve(model, bare.fact.subject)
        return cls(np.random.RandomState(noise.seed), drawn, start, after - start, model.hidden_size)

    def draw(self, rows: int) -> list[EmbeddingNoise]:
        """What is added to each row of a pass."""
        drawn = self.noise.draw(self.state, rows, self.tokens, self.hidden)
        return [EmbeddingNoise(self.start, each) for each in drawn]
