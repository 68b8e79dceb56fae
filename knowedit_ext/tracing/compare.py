"""Two traces of one prompt, compared cell by cell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..plots import drawn_text
from .trace import Trace


@dataclass(frozen=True)
class Difference:
    """change: [tokens, layers], the second trace's indirect effect less the first's."""

    first: Trace
    second: Trace
    change: np.ndarray

    @property
    def correlation(self) -> float:
        """Pearson's, of the two maps of indirect effects; NaN where one of them is constant."""
        both = [trace.indirect_effect.ravel() for trace in (self.first, self.second)]
        return float(np.corrcoef(*both)[0, 1]) if all(map(np.ptp, both)) else float("nan")

    @property
    def largest(self) -> tuple[int, int]:
        """The (token, layer) that differs most."""
        token, layer = np.unravel_index(int(np.abs(self.change).argmax()), self.change.shape)
        return int(token), int(layer)

    def table(self) -> str:
        """Markdown: what each says, and where they differ most."""
        lines = ["| | kind | answer | clean | corrupted | best restored | at |", "|---|---|---|--:|--:|--:|---|"]
        for name, trace in (("first", self.first), ("second", self.second)):
            token, layer = np.unravel_index(int(trace.scores.argmax()), trace.scores.shape)
            scores = f"{trace.high_score:.3f} | {trace.low_score:.3f} | {trace.scores.max():.3f}"
            place = f"{trace.tokens[token]!r}, layer {layer}"
            lines.append(f"| {name} | {trace.kind} | {trace.answer!r} | {scores} | {place} |")
        token, layer = self.largest
        where = f"{self.first.tokens[token]!r}, layer {layer}"
        lines += ["", f"Largest difference of effects: {self.change[token, layer]:+.3f} at {where}; correlation of the "
                  f"maps {self.correlation:.3f}."]  # fmt: skip
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        token, layer = self.largest
        largest = {"token": token, "layer": layer, "change": float(self.change[token, layer])}
        return {"change": self.change, "largest": largest, "correlation": self.correlation}

    def plot(self, path: str | Path | None = None) -> Any:
        """The change as a heat map. Returns the figure."""
        shown = replace(self.second, scores=self.change, low_score=0.0, estimate=None, refined=())
        title = f"{drawn_text(''.join(shown.tokens).strip())}\neffects: the second trace's less the first's"
        return shown.plot(path, title=title, scale="change of the indirect effect")


def difference(first: Trace, second: Trace) -> Difference:
    """second less first. ValueError where they are not of the same tokens and layers."""
    if first.tokens != second.tokens:
        raise ValueError(f"the traces are of other tokens: {first.tokens} and {second.tokens}")
    if first.scores.shape != second.scores.shape:
        layers = first.scores.shape[1], second.scores.shape[1]
        raise ValueError(f"the traces are of models with {layers[0]} and {layers[1]} layers")
    return Difference(first, second, second.indirect_effect - first.indirect_effect)
