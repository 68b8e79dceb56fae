"""`Trace`: what causal tracing found for one fact, on disk in the published layout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import typed
from ..frames import frame
from ..notebook import html_table, shades
from ..plots import png_of, shown_text
from ..runs.files import load_npz, write_npz
from .attribution import agreement
from .kinds import KINDS, kind_of_saved
from .plots import plot_trace

if TYPE_CHECKING:
    import pandas


@dataclass
class Trace:
    """The indirect effect of every (token, layer) cell of one prompt.

    scores: float32 [tokens, layers], mean over samples of P*, clean h_i^(l)[o]: the answer's probability when the cell
        (for kind "mlp" / "attn": `window` layers around it) is restored in the corrupted run. In the units of `score`.
    sample_scores: float32 [samples, tokens, layers]; low_samples: [samples] without restoration.
    low_score, high_score: corrupted and clean; answer: text; answer_ids: its tokens.
    tokens, input_ids: the prompt; subject_range: (first, after) subject tokens.
    correct_prediction: False where an expected attribute was given and the model says something else.
    settings: noise, seed, sever, ... as they were used.
    estimate: by method "attribution" the estimated scores [tokens, layers] of all cells; refined: the cells (token,
        layer) that are exact in `scores` and `sample_scores`. None and empty where all are.
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
    estimate: np.ndarray | None = field(default=None, repr=False)
    refined: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    @property
    def indirect_effect(self) -> np.ndarray:
        """scores - low_score, [tokens, layers]."""
        return self.scores - np.float32(self.low_score)

    @property
    def total_effect(self) -> float:
        return self.high_score - self.low_score

    @property
    def agreement(self) -> float:
        """Pearson's correlation of estimated and exact scores over the refined cells; NaN for fewer than three."""
        if self.estimate is None:
            return float("nan")
        cells = tuple(np.array(self.refined, int).reshape(-1, 2).T)
        return agreement(self.estimate[cells], self.scores[cells])

    @property
    def standard_error(self) -> np.ndarray:
        """Of `scores` over the noise samples, [tokens, layers]; NaN for a single sample."""
        samples = len(self.sample_scores)
        if samples < 2:
            return np.full_like(self.scores, np.nan)
        return self.sample_scores.std(axis=0, ddof=1) / np.sqrt(np.float32(samples))

    def rows(self) -> list[dict[str, Any]]:
        """Tidy, a cell each: position, token, layer, score, effect, stderr (None for a single noise sample)."""
        errors, effects = self.standard_error, self.indirect_effect
        return [
            {
                "position": n,
                "token": token,
                "layer": layer,
                "score": float(self.scores[n, layer]),
                "effect": float(effects[n, layer]),
                "stderr": None if np.isnan(errors[n, layer]) else float(errors[n, layer]),
            }
            for n, token in enumerate(self.tokens)
            for layer in range(self.scores.shape[1])
        ]

    def to_pandas(self) -> pandas.DataFrame:
        """`rows` as a DataFrame (needs pandas)."""
        return frame(self.rows())

    def to_html(self, path: str | Path, also: Sequence[Trace] = ()) -> None:
        """One self-contained page: the map to click, its noise samples and a table (needs plotly and jinja2).

        also: traces of the same prompt, of other kinds, that the page can switch to.
        """
        from ..pages.page import write_page
        from ..pages.results import trace_page

        write_page(path, trace_page([self, *also]))

    def __repr__(self) -> str:
        size = f"{self.scores.shape[0]} tokens x {self.scores.shape[1]} layers"
        scores = f"clean {self.high_score:.3g}, corrupted {self.low_score:.3g}"
        return f"Trace({self.kind}, ->{self.answer!r}, {size}, {scores})"

    def plot(self, path: str | Path | None = None, **kwargs: Any):
        """Heat map in the papers' style; written to `path` (.png, .pdf, ...) where given. Returns the figure."""
        return plot_trace(self, path, **kwargs)

    def _repr_html_(self) -> str:
        """The map as a table, in a notebook."""
        kind, layers = KINDS[self.kind], range(self.scores.shape[1])
        first, after = self.subject_range
        rows = [
            [shown_text(token) + "*" * (first <= n < after), *map(float, self.scores[n])]
            for n, token in enumerate(self.tokens)
        ]
        errors = self.standard_error
        hover = [[f"{x:.4f}{'' if np.isnan(e) else f' ± {e:.4f} (standard error)'}" for x, e in zip(*pair, strict=True)]
                 for pair in zip(self.scores, errors, strict=True)]  # fmt: skip
        text = shown_text("".join(self.tokens) + " →" + self.answer)
        caption = f"{text}: {self.high_score:.3f} clean, {self.low_score:.3f} with the subject* corrupted; by layer "
        caption += f"where the clean {kind.label} is restored"
        columns = ["", *map(str, layers)]
        return html_table(caption, columns, rows, shades(self.indirect_effect, kind.colours), hover)

    def _repr_png_(self) -> bytes:
        """The heat map, inline in a notebook."""
        return png_of(self.plot())

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
        if self.estimate is not None:
            arrays["estimate"] = self.estimate.astype(np.float32)
            arrays["refined"] = np.array(self.refined, np.int64).reshape(-1, 2)
        write_npz(path, arrays)

    @classmethod
    @typed
    def load(cls, path: str | Path) -> Trace:
        """Read a trace saved here or by the published code. Raises ValueError for what is no such file."""
        data = load_npz(path, (), LAYOUT)
        try:
            return _read(data)
        except ValueError as error:
            raise ValueError(f"'{path}' is no trace: {error}") from error


# name in the file: kinds of numpy's types, dimensions
NEEDED = {
    "scores": ("fiu", 2),
    "low_score": ("fiu", 0),
    "high_score": ("fiu", 0),
    "input_tokens": ("U", 1),
    "subject_range": ("iu", 1),
    "answer": ("U", 0),
}
LAYOUT = NEEDED | {
    "kind": ("U", 0),
    "window": ("iu", 0),
    "correct_prediction": ("b", 0),
    "input_ids": ("iu", 1),
    "answer_ids": ("iu", 1),
    "sample_scores": ("f", 3),
    "low_samples": ("f", 1),
    "settings": ("U", 0),
    "estimate": ("f", 2),
    "refined": ("iu", 2),
}
TYPES = {"fiu": "numbers", "f": "numbers", "iu": "whole numbers", "U": "text", "b": "true or false"}


def _read(data: Mapping[str, np.ndarray]) -> Trace:
    _check_types(data)
    if not data.get("correct_prediction", True) and "scores" not in data:
        raise ValueError("the model did not predict the expected attribute, and nothing was traced")
    if missing := [name for name in NEEDED if name not in data]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    scores, tokens = data["scores"].astype(np.float32), [str(token) for token in data["input_tokens"]]
    if len(tokens) != len(scores) or not scores.size:
        raise ValueError(f"scores {list(scores.shape)} for {len(tokens)} tokens")
    traced = ~np.isnan(scores).all(axis=1)  # other tokens were not asked for
    if not traced.any() or not np.isfinite(scores[traced]).all():
        raise ValueError("scores are no finite numbers")
    low, high, window = float(data["low_score"]), float(data["high_score"]), int(data.get("window", 10))
    if not (math.isfinite(low) and math.isfinite(high) and window > 0):
        raise ValueError(f"low_score is {low}, high_score {high}, window {window}")
    subject = tuple(data["subject_range"].tolist())
    if len(subject) != 2 or not 0 <= subject[0] < subject[1] <= len(tokens):
        raise ValueError(f"subject_range {subject} among {len(tokens)} tokens")
    samples = data.get("sample_scores", np.zeros((0, *scores.shape), np.float32))
    if samples.shape[1:] != scores.shape:
        raise ValueError(f"sample_scores {list(samples.shape)} for scores {list(scores.shape)}")
    estimate, refined = data.get("estimate"), data.get("refined", np.zeros((0, 2), np.int64))
    if estimate is not None and estimate.shape != scores.shape:
        raise ValueError(f"estimate {list(estimate.shape)} for scores {list(scores.shape)}")
    if refined.shape[1] != 2 or not ((0 <= refined) & (refined < scores.shape)).all():
        raise ValueError(f"refined cells {refined.tolist()[:3]} of scores {list(scores.shape)}")
    return Trace(
        scores=scores,
        low_score=low,
        high_score=high,
        answer=str(data["answer"]),
        answer_ids=tuple(data.get("answer_ids", np.zeros(0, np.int64)).tolist()),
        tokens=tokens,
        input_ids=data.get("input_ids", np.zeros(0, np.int64)),
        subject_range=subject,
        kind=kind_of_saved(str(data.get("kind", ""))).name,
        window=window,
        sample_scores=samples,
        low_samples=data.get("low_samples", np.zeros(0, np.float32)),
        correct_prediction=bool(data.get("correct_prediction", True)),
        settings=_settings(str(data.get("settings", "{}"))),
        estimate=estimate,
        refined=tuple((int(token), int(layer)) for token, layer in refined),
    )


def _check_types(data: Mapping[str, np.ndarray]) -> None:
    for name, array in data.items():
        kinds, dimensions = LAYOUT[name]
        if array.dtype.kind not in kinds or array.ndim != dimensions:
            wanted = f"{TYPES[kinds]} in {dimensions} dimensions"
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected {wanted}")


def _settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError("settings is no JSON object")
    return settings


def was_predicted(path: str | Path) -> bool:
    """Did the model say the expected attribute? Else the published layout's file holds nothing more."""
    data = load_npz(path, (), ("correct_prediction",))
    try:
        _check_types(data)
    except ValueError as error:
        raise ValueError(f"'{path}' is no trace: {error}") from error
    return bool(data.get("correct_prediction", True))
