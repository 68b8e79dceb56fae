"""What `suggest` found: parameters, the table of what was tried, the figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import typed
from ..editing.params import LayerParams
from ..evaluation.scores import harmonic_difference
from ..plots import figure_of, finish
from ..runs.files import atomic_write, write_json
from .findings import HALF, NORMAL, Findings, means_of, write_csv
from .layers import spelled
from .plots import SMALL, line, look, named
from .suggest_space import Space
from .suggest_trials import HELD_OUT, SCORES, SEARCHED, Trial, Trials

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARAMS = "params.json"
SHOWN = 10  # candidates of the search in the table
COLUMNS = 3  # of the figure's panels
SUGGESTED, BEGUN_FROM = "suggested", "begun from"


@dataclass(frozen=True)
class Suggestion:
    """params: the best of the search, of `method`; `save` writes them as a file that `params=` and `--params` take.

    rows: every candidate in every round: what was searched of its parameters, and all ("params"); records, S ES PS NS
    on the searched half with half the widths of 95 % intervals ("S_half"), seconds. held: the same of `params`, and of
    what was begun from, on the half that the search did not see. difference: of the two, {"S", "S_half"}, paired;
    None where they are one, or one could not be edited. effect: tracing's by layer, see `suggest.traced_effect`. tried,
    size: candidates of the space that were tried, and that there are. seconds: of all its work. notes: what could not
    be edited, and why.
    """

    params: LayerParams
    method: str
    rows: list[dict[str, Any]]
    held: list[dict[str, Any]]
    difference: dict[str, Any] | None
    effect: dict[str, Any] | None
    tried: int
    size: int
    seconds: float
    settings: dict[str, Any]
    notes: list[str]

    def __repr__(self) -> str:
        return f"Suggestion({self.method}, {self.tried} of {self.size} candidates, layers {list(self.params.layers)})"

    @property
    def share(self) -> float:
        """Of the space that was tried."""
        return self.tried / self.size

    @classmethod
    def of(
        cls, trials: Trials, rounds: Sequence[Sequence[Trial]], held: Sequence[Trial], effect: dict[str, Any] | None
    ) -> Suggestion:
        """held: of the best one, and of the base where that is another."""
        space = trials.space
        rows = []
        for number, tried in enumerate(rounds):
            for trial in sorted(tried, key=lambda trial: trial.rank, reverse=True):
                means = means_of(trial.cases)
                scores = {name: means.get(name) for name in _with_halves(("S", *SCORES))}
                rows.append({"round": number + 1, **_shown(trial, space), **scores, "seconds": trial.seconds})
        return cls(
            params=held[0].params,
            method=trials.method.name,
            rows=rows,
            held=[
                {"candidate": name, **_shown(trial, space), **means_of(trial.cases)}
                for name, trial in zip((SUGGESTED, BEGUN_FROM), held, strict=False)
            ],
            difference=_difference(held),
            effect=effect,
            tried=len({trial.params for tried in rounds for trial in tried if space.holds(trial.params)}),
            size=space.size,
            seconds=trials.seconds,
            settings={
                "together": trials.together,
                "seed": trials.seed,
                "begun_from": space.base.to_dict(),
                "windows": [list(window) for window in space.windows],
                "ranges": {name: list(values) for name, values in space.ranges.items()},
                "records": {name: len(half) for name, half in trials.halves.items()},
            },
            notes=[f"{_named(trial, space)}: {trial.ended}" for trial in rounds[0] if trial.ended is not None],
        )

    def table(self) -> str:
        """Markdown: the held-out half, what was tried, and the best of it."""
        held = Findings(self._columns(self.held), {}, ("candidate", *self._searched))
        best = Findings(self._columns(self.best()), {}, ("round", *self._searched), notes=self.notes)
        unseen = f"{self.method}, {self.settings['records'][HELD_OUT]} records that the search did not see:"
        return f"{unseen}\n\n{held.table()}\n{self._compared()}{self._searching()}; the best:\n\n{best.table()}"

    def lead(self) -> str:
        """What was found, in some lines."""
        search = f"{self._searching()}, whose S, of the best of many, is too good."
        return "\n".join([line for line in (self._compared().strip(), search, *self.notes) if line])

    def best(self) -> list[dict[str, Any]]:
        """Rows of the ten candidates that went farthest, each in its last round."""
        last = {json.dumps(row["params"]): row for row in self.rows}
        ordered = sorted(last.values(), key=lambda row: (row["round"], -1.0 if row["S"] is None else row["S"]))
        return ordered[: -SHOWN - 1 : -1]

    def plot(self, path: str | Path | None = None) -> Figure:
        """S by layer for each setting, and the tracing effect beside it; written where a path is given."""
        return finish(by_layer(self), path)

    def to_html(self, path: str | Path) -> None:
        """One self-contained page: what was found beside what was begun from and presets, S by layer for each setting
        with the tracing effect below, and every candidate by round (needs plotly and jinja2)."""
        from ..pages.page import write_page
        from .suggestion_page import suggestion_page

        write_page(path, suggestion_page(self))

    def to_dict(self) -> dict[str, Any]:
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "params": self.params.to_dict(),
        }

    @typed
    def save(self, folder: str | Path) -> None:
        """params.json; suggest.json, .csv (`rows`), .md (`table()`); by_layer.png, .pdf: atomically."""
        folder = Path(folder)
        write_json(folder / PARAMS, self.params.to_dict())
        write_json(folder / "suggest.json", self.to_dict())
        write_csv(folder / "suggest.csv", [name for name in self.rows[0] if name != "params"], self.rows)
        atomic_write(folder / "suggest.md", lambda file: file.write(self.table().encode()))
        for suffix in ("png", "pdf"):
            self.plot(folder / f"by_layer.{suffix}")

    @property
    def _searched(self) -> list[str]:
        return ["layers", *self.settings["ranges"]]

    def _columns(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        wanted = ("candidate", "round", *self._searched, "records", "S", *SCORES)
        return [{name: row[name] for name in _with_halves(wanted) if name in row} for row in rows]

    def _searching(self) -> str:
        share, minutes = f"{100 * self.share:.2g} %", f"{self.seconds / 60:.1f} minutes"
        records = f"on up to {self.settings['records'][SEARCHED]} other records"
        return f"{self.tried} of {self.size} candidates ({share}) tried in {minutes}, {records}"

    def _compared(self) -> str:
        if len(self.held) == 1:
            return "What was begun from is what was found.\n\n"
        if self.difference is None:
            return ""
        half = self.difference["S" + HALF]
        interval = "" if half is None else f" ± {half:.2g} (95 %, paired)"
        return f"S of the suggested less that of what was begun from: {self.difference['S']:+.3g}{interval}.\n\n"


def _with_halves(names: Sequence[str]) -> list[str]:
    return [name + half for name in names for half in ("", HALF)]


def _shown(trial: Trial, space: Space) -> dict[str, Any]:
    layers = trial.params.layers
    values = {name: getattr(trial.params, name) for name in space.ranges}
    told = {"last": layers[-1], "size": len(layers), "records": trial.records, "params": trial.params.to_dict()}
    return {"layers": spelled(layers), **values, **told}


def _named(trial: Trial, space: Space) -> str:
    shown = _shown(trial, space)
    return ", ".join(f"{name} {shown[name]}" for name in ("layers", *space.ranges))


def _difference(held: Sequence[Trial]) -> dict[str, Any] | None:
    if len(held) < 2 or any(trial.ended is not None for trial in held):
        return None
    first, second = (np.array([[case[name] for name in SCORES] for case in trial.cases]) for trial in held)
    mean = harmonic_difference(first, second)
    return {"S": mean.mean, "S" + HALF: None if mean.stderr is None else NORMAL * mean.stderr}


def by_layer(found: Suggestion) -> Figure:
    """The first round's best S of each setting against the last layer of the window, a panel a parameter and a line a
    value; and the tracing effect by layer."""
    names = ["size", *found.settings["ranges"]]
    panels = len(names) + (found.effect is not None)
    rows = -(-panels // COLUMNS)
    figure = figure_of(2.6 * min(panels, COLUMNS), 2.3 * rows)
    axes = figure.subplots(rows, min(panels, COLUMNS), sharex=True, squeeze=False).ravel()
    for panel, name in zip(axes, names, strict=False):
        _lines(panel, found, name)
    if found.effect is not None:
        effect = found.effect["effect"]
        axes[len(names)].bar(range(len(effect)), effect, color=look(4)["color"])
        title = f"tracing: MLP effect, {found.effect['facts']} facts"
        named(axes[len(names)], "layer", "average indirect effect", title)
    for panel in axes[panels:]:
        panel.set_visible(False)
    return figure


def _lines(axes: Axes, found: Suggestion, name: str) -> None:
    for number, (value, best) in enumerate(best_at(found.rows, name)):
        line(axes, list(best), [row["S"] for row in best.values()], number, value)
    named(axes, "last layer", "best S", panel_title(name))
    axes.legend(fontsize=SMALL - 1, frameon=False)


def panel_title(name: str) -> str:
    return "layers of the window" if name == "size" else name


def best_at(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[str, dict[int, Mapping[str, Any]]]]:
    """Each value of a column, in words, with {last layer of the window: the first round's best row there}."""
    tried = [row for row in rows if row["round"] == 1 and row["S"] is not None]
    best: dict[Any, dict[int, Mapping[str, Any]]] = {row[name]: {} for row in tried}
    for row in sorted(tried, key=lambda row: (row["last"], row["S"])):
        best[row[name]][row["last"]] = row
    ordered = sorted(best, key=lambda value: (0, value, "") if _is_number(value) else (1, 0, str(value)))
    return [(f"{value:g}" if _is_number(value) else str(value), best[value]) for value in ordered]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
