"""Attention knockout (Geva et al. 2023, section 5): through which edges does the answer reach the last token?

Nothing is corrupted: in the clean run the tokens whose predictions are read do not see a group of positions, in a
window of layers. All windows and groups of all facts are runs of one sweep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import TYPE_CHECKING, get_type_hints

import numpy as np
import torch

from ..checks import as_type, quoted
from ..model.facts import Fact, TokenizedFact, tokenize_fact
from ..model.load import EditableModel
from ..plots import MARKERS, OKABE_ITO, figure_of, finish
from ..runs.files import load_json, write_json
from ..sweep import Interventions, Knockout
from .answer import answer_of, scores_of
from .interval import Interval
from .kinds import window_for, window_layers
from .settings import TraceSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Groups = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class KnockoutTrace:
    """The answer's score with the edges to a group of positions cut, in a window of layers around each layer.

    scores: by group float32 [layers], in the units of `score`; clean_score: with no edge cut; groups: the positions of
    each; answer: text; answer_ids: its tokens; tokens: of the prompt; subject_range: (first, after) subject token;
    window: layers cut together.
    """

    scores: dict[str, np.ndarray]
    clean_score: float
    groups: dict[str, tuple[int, ...]]
    answer: str
    answer_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    subject_range: tuple[int, int]
    window: int
    score: str = "probability"

    @property
    def change(self) -> dict[str, np.ndarray]:
        """By group [layers]: relative to the clean probability as published (-1: all of it is gone); for the other
        scores the difference."""
        clean = self.clean_score
        return {
            name: scores / clean - 1 if self.score == "probability" else scores - clean
            for name, scores in self.scores.items()
        }

    def __repr__(self) -> str:
        size = f"{len(self.tokens)} tokens x {len(next(iter(self.scores.values()), ()))} layers"
        return f"KnockoutTrace({', '.join(self.scores)}, ->{self.answer!r}, {size}, clean {self.clean_score:.3g})"

    def plot(self, path: str | Path | None = None) -> Figure:
        """A line a group over the layers; written to `path` (.png, .pdf, .svg) where given."""
        return plot_knockouts([self], path)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, atomically."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        write_json(path, fields | {"scores": {name: scores.tolist() for name, scores in self.scores.items()}})

    @classmethod
    def load(cls, path: str | Path) -> KnockoutTrace:
        """What `save` wrote; ValueError names the file and what in it is something else."""
        given, hints = load_json(path), get_type_hints(cls)
        if set(given) != set(hints):
            raise ValueError(f"'{path}' is no knockout: expected {', '.join(hints)}")
        for name in ("scores", "groups"):
            if not isinstance(given[name], dict) or not given[name]:
                raise ValueError(f"'{path}': {name} is {brief(given[name])}: expected an object by group")
            kind = tuple[float, ...] if name == "scores" else tuple[int, ...]
            given[name] = {k: as_type(f"'{path}': {name}.{k}", v, kind) for k, v in given[name].items()}
        rest = {k: as_type(f"'{path}': {k}", v, hints[k]) for k, v in given.items() if k not in ("scores", "groups")}
        scores = {name: np.array(values, np.float32) for name, values in given["scores"].items()}
        if set(scores) != set(given["groups"]) or len({len(values) for values in scores.values()}) > 1:
            raise ValueError(f"'{path}': scores and groups do not fit each other")
        return cls(scores=scores, groups=given["groups"], **rest)


def positions_of(tokenized: TokenizedFact) -> dict[str, tuple[int, ...]]:
    """The published groups: the subject's tokens, the last token, and the rest between and before them."""
    subject, last = range(*tokenized.subject_range), len(tokenized.ids) - 1
    rest = tuple(p for p in range(last) if p not in subject)
    return {name: at for name, at in (("subject", tuple(subject)), ("rest", rest), ("last", (last,))) if at}


def trace_knockouts(
    model: EditableModel, facts: Sequence[Fact], groups: Groups | None, settings: TraceSettings
) -> list[KnockoutTrace]:
    """Of facts, in one sweep. groups: positions by name, for every fact; None: `positions_of` each."""
    window = window_for(model.num_layers, settings.window, ("attn",))
    plans = [_Plan(model, tokenize_fact(model, fact), groups, window, settings) for fact in facts]
    interventions = Interventions()
    for number, plan in enumerate(plans):
        plan.add_runs(interventions, number)
    scores = scores_of(model, plans, interventions, settings)
    return [plan.read(scores) for plan in plans]


class _Plan:
    def __init__(
        self,
        model: EditableModel,
        tokenized: TokenizedFact,
        groups: Groups | None,
        window: int,
        settings: TraceSettings,
    ) -> None:
        self.tokenized, self.window, self.layers, self.score = tokenized, window, model.num_layers, settings.score
        self.answer = answer_of(model, tokenized, settings)
        groups = positions_of(tokenized) if groups is None else groups
        self.groups = {name: self._checked(name, positions) for name, positions in groups.items()}
        self.runs: dict[str, list[int]] = {}

    def _checked(self, name: str, positions: Sequence[int]) -> tuple[int, ...]:
        length, text = len(self.tokenized.ids), self.tokenized.fact.text
        unseen = tuple(sorted({*positions}))
        if not unseen or unseen[0] < 0 or unseen[-1] >= length:
            raise ValueError(f"group {quoted(name)} is {list(positions)}: {quoted(text)} has positions 0..{length - 1}")
        if len(unseen) == length:
            raise ValueError(f"group {quoted(name)} is all of {quoted(text)}: its last token would see nothing")
        return unseen

    def add_runs(self, interventions: Interventions, prompt: int) -> None:
        readout, layers = tuple(self.answer.readout), range(self.layers)
        root = interventions.add_root(len(self.answer.clean.ids), prompt=prompt)
        self.clean_run = interventions.add_run(root, (), readout)
        for name, unseen in self.groups.items():
            cuts = [Knockout(window_layers(layer, self.window, self.layers), readout, unseen) for layer in layers]
            self.runs[name] = [interventions.add_run(root, (cut,), readout) for cut in cuts]

    @property
    def hidden(self) -> list[torch.Tensor]:
        return [self.answer.clean.hidden]

    def read(self, scores: Sequence[np.ndarray]) -> KnockoutTrace:
        by_layer = lambda runs: np.concatenate([scores[run] for run in runs]).astype(np.float32)  # noqa: E731
        return KnockoutTrace(
            scores={name: by_layer(runs) for name, runs in self.runs.items()},
            clean_score=float(scores[self.clean_run][0]),
            groups=self.groups,
            answer=self.answer.text,
            answer_ids=self.answer.ids,
            tokens=tuple(self.tokenized.tokens),
            subject_range=self.tokenized.subject_range,
            window=self.window,
            score=self.score,
        )


def knockout_effects(traces: Sequence[KnockoutTrace]) -> dict[str, Interval]:
    """By group the mean `change` at each layer over the facts that have it, with its 95 % confidence interval."""
    if not traces:
        raise ValueError("no knockouts to average")
    if len({(trace.window, trace.score, len(next(iter(trace.scores.values())))) for trace in traces}) > 1:
        raise ValueError("the knockouts differ in window, score or number of layers: average those of one kind")
    names = dict.fromkeys(name for trace in traces for name in trace.scores)
    return {name: Interval.of(np.stack([t.change[name] for t in traces if name in t.scores])) for name in names}


def plot_knockouts(traces: Sequence[KnockoutTrace], path: str | Path | None = None) -> Figure:
    """Mean change by layer, a line a group, with 95 % confidence bands where there are several facts."""
    effects = knockout_effects(traces)
    figure = figure_of(4.6, 3.2)
    axes = figure.add_subplot()
    percent = 100 if traces[0].score == "probability" else 1
    for number, (name, interval) in enumerate(effects.items()):
        y = percent * np.array(interval.mean)
        x, look = np.arange(len(y)), number % len(OKABE_ITO)
        axes.plot(x, y, color=OKABE_ITO[look], marker=MARKERS[look], markersize=3, linewidth=1.2, label=name)
        if interval.half_width is not None:
            half = percent * np.array(interval.half_width)
            axes.fill_between(x, y - half, y + half, color=OKABE_ITO[look], alpha=0.15, linewidth=0)
    axes.axhline(0, color="0.7", linewidth=0.6)
    axes.set_xlabel(f"centre of {traces[0].window} layers whose edges are cut", fontsize=8)
    axes.set_ylabel("change of p(answer), %" if percent > 1 else f"change of the {traces[0].score}", fontsize=8)
    axes.set_title(f"Edges from the last token cut, {len(traces)} prompt{'s' * (len(traces) > 1)}", fontsize=9)
    axes.tick_params(labelsize=7)
    figure.legend(loc="outside upper center", ncols=len(effects), fontsize=7, frameon=False)
    return finish(figure, path)
