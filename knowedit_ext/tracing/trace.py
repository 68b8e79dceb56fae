"""`Trace`: what causal tracing found for one fact, on disk in the published layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..runs.files import load_npz, write_npz
from .kinds import KINDS
from .plots import plot_trace


@dataclass
class Trace:
    """The indirect effect of every (token, layer) cell of one prompt.

    scores: float32 [tokens, layers], mean over samples of P*, clean h_i^(l)[o]: the answer's probability when the cell
        (for kind "mlp" / "attn": `window` layers around it) is restored in the corrupted run. In the units of `score`.
    sample_scores: float32 [samples, tokens, layers]; low_samples: [samples] without restoration.
    low_score, high_score: corrupted and clean; answer: text; answer_ids: its tokens.
    tokens, input_ids: the prompt; subject_range: (first, last + 1) subject token.
    correct_prediction: False where an expected attribute was given and the model says something else.
    settings: noise, seed, sever, ... as they were used.
    """

    scores: np.ndarray
    low_score: float
    high_score: float
    answer: str
    answer_ids: tuple[int, ...]
    tokens: list[str]
    input_ids: np.ndarray
    subject_range: tuple[int, int]
    kind: str = "state"
    window: int = 10
    sample_scores: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32), repr=False)
    low_samples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32), repr=False)
    correct_prediction: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def indirect_effect(self) -> np.ndarray:
        """scores - low_score, [tokens, layers]."""
        return self.scores - np.float32(self.low_score)

    @property
    def total_effect(self) -> float:
        return self.high_score - self.low_score

    @property
    def standard_error(self) -> np.ndarray:
        """Of `scores` over the noise samples, [tokens, layers]; NaN for a single sample."""
        samples = len(self.sample_scores)
        if samples < 2:
            return np.full_like(self.scores, np.nan)
        return self.sample_scores.std(axis=0, ddof=1) / np.sqrt(np.float32(samples))

    def plot(self, path: str | Path | None = None, **kwargs: Any):
        """Heat map in the papers' style; written to `path` (.png, .pdf, ...) where given. Returns the figure."""
        return plot_trace(self, path, **kwargs)

    def _repr_png_(self) -> bytes:
        """The heat map, inline in a notebook."""
        import io

        out = io.BytesIO()
        self.plot().savefig(out, format="png", bbox_inches="tight")
        return out.getvalue()

    def save(self, path: str | Path) -> None:
        """Write an .npz with the published keys (rome, causal_trace.py:115-119, 356-367), atomically."""
        if Path(path).suffix != ".npz":
            raise ValueError(f"'{path}': a trace is saved as .npz")
        arrays = {
            "scores": self.scores.astype(np.float32),
            "low_score": np.float64(self.low_score),
            "high_score": np.float64(self.high_score),
            "input_ids": np.asarray(self.input_ids, np.int64),
            "input_tokens": np.array(self.tokens),
            "subject_range": np.array(self.subject_range, np.int64),
            "answer": np.array(self.answer),
            "window": np.int64(self.window),
            "correct_prediction": np.bool_(self.correct_prediction),
            "kind": np.array(KINDS[self.kind].saved),
            # ours, beyond the published keys
            "answer_ids": np.array(self.answer_ids, np.int64),
            "sample_scores": self.sample_scores.astype(np.float32),
            "low_samples": self.low_samples.astype(np.float32),
            "settings": np.array(json.dumps(self.settings, sort_keys=True)),
        }
        write_npz(path, arrays)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace saved here or by the published code. Raises ValueError for what is no such file."""
        data = load_npz(path)
        if not bool(data.get("correct_prediction", True)) and "scores" not in data:
            raise ValueError(f"'{path}' holds no trace: the model did not predict the expected attribute")
        missing = [
            k for k in ("scores", "low_score", "high_score", "input_tokens", "subject_range", "answer") if k not in data
        ]
        if missing:
            raise ValueError(f"'{path}' is no trace: it lacks {', '.join(missing)}")

        def read(name: str, convert: Callable[[Any], Any], default: Any = None) -> Any:
            try:
                return convert(data.get(name, default))
            except (ValueError, TypeError) as error:
                raise ValueError(f"'{path}' is no trace: {name} is {data[name]}") from error

        scores = read("scores", lambda x: x.astype(np.float32))
        tokens = [str(t) for t in data["input_tokens"]]
        if scores.ndim != 2 or len(tokens) != len(scores):
            raise ValueError(f"'{path}' is no trace: scores {list(scores.shape)} for {len(tokens)} tokens")
        subject = read("subject_range", lambda x: tuple(int(i) for i in x))
        if len(subject) != 2 or not 0 <= subject[0] < subject[1] <= len(tokens):
            raise ValueError(f"'{path}' is no trace: subject_range {subject} among {len(tokens)} tokens")
        kind = {"": "state", "None": "state"}.get(str(data.get("kind", "")), str(data.get("kind")))
        if kind not in KINDS:
            raise ValueError(f"'{path}' is no trace: unknown kind '{kind}'")
        return cls(
            scores=scores,
            low_score=read("low_score", float),
            high_score=read("high_score", float),
            answer=str(data["answer"]),
            answer_ids=read("answer_ids", lambda x: tuple(int(i) for i in x), ()),
            tokens=tokens,
            input_ids=data.get("input_ids", np.zeros(0, np.int64)),
            subject_range=subject,
            kind=kind,
            window=read("window", int, 10),
            sample_scores=data.get("sample_scores", np.zeros((0, *scores.shape), np.float32)),
            low_samples=data.get("low_samples", np.zeros(0, np.float32)),
            correct_prediction=bool(data.get("correct_prediction", True)),
            settings=read("settings", lambda x: json.loads(str(x)), "{}"),
        )
