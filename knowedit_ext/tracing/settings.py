"""What a trace does to a fact, beside the kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..checks import Compat, Count, Natural, Seed, read_fields


@dataclass(frozen=True)
class TraceSettings:
    """See `trace`."""

    window: Count | None = None
    samples: Count = 10
    seed: Seed = 1
    sever: Literal[None, "mlp", "attn"] = None
    compat: Compat = None
    replace: bool = False
    corrupt_with: str | None = None
    answer_tokens: Count = 1
    score: Literal["probability", "logprob", "logit_difference"] = "probability"
    against: str | None = None
    tokens: str | tuple[int, ...] | None = None
    max_rows: Count | None = None
    method: Literal["exact", "attribution"] = "exact"
    refine: Natural = 0

    def __post_init__(self) -> None:
        read_fields(self)
        if (self.score == "logit_difference") != (self.against is not None):
            raise ValueError("score='logit_difference' and against= (the second answer) go together")
        if self.refine and self.method == "exact":
            raise ValueError("refine computes the strongest cells of method='attribution' exactly: all are here")
        if self.method == "attribution" and (self.sever is not None or self.compat is not None):
            raise ValueError("method='attribution' estimates single cells: there is no sever and no compat")
        if self.replace and self.corrupt_with is not None:
            raise ValueError("replace says what noise does to the embeddings: with corrupt_with there is no noise")
