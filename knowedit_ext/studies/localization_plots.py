"""The figures of Hase et al. 2023, from a study's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..plots import OKABE_ITO, figure_of, finish
from .plots import SMALL, legend, line, look, named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .localization_results import Localization

FACETS = 8  # edited layers that one figure shows


def plot_all(study: Localization, folder: Path, formats: Sequence[str]) -> list[Path]:
    figures: dict[str, Callable[[Localization], Figure]] = {
        "effect_by_layer": effect_by_layer,
        "peaks": peaks,
        "score_against_effect": score_against_effect,
        "scores_by_layer": scores_by_layer,
        "explained": explained,
    }
    paths = []
    for name, draw in figures.items():
        figure = draw(study)
        for suffix in formats:
            paths.append(folder / f"{name}.{suffix}")
            finish(figure, paths[-1])
    return paths


def effect_by_layer(study: Localization) -> Figure:
    """Mean over facts of what a window around each layer brings back, with 95 % confidence."""
    effects = study.effects
    figure = figure_of(4.6, 3.0)
    axes = figure.add_subplot()
    layers, mean = np.arange(effects.shape[1]), effects.mean(0)
    half = 1.96 * effects.std(0, ddof=1) / np.sqrt(len(effects)) if len(effects) > 1 else np.zeros(len(mean))
    line(axes, layers, mean, 0, band=(mean - half, mean + half))
    window = study.settings["trace"]["window"]
    title = f"Tracing effect, {len(effects)} facts"
    named(axes, f"centre of {window} restored MLP layers", "share of the effect restored", title)
    axes.set_ylim(0, 1)
    return figure


def peaks(study: Localization) -> Figure:
    """At which layer each fact's effect is largest."""
    effects = study.effects
    figure = figure_of(4.6, 3.0)
    axes = figure.add_subplot()
    counts = np.bincount(effects.argmax(1), minlength=effects.shape[1])
    axes.bar(np.arange(len(counts)), counts, color=OKABE_ITO[0])
    named(axes, "layer where a fact's effect is largest", "facts", f"Peaks of the tracing effect, {len(effects)} facts")
    return figure


def score_against_effect(study: Localization) -> Figure:
    """Rewrite score against tracing effect, a line a method, a panel an edited layer (the first problem)."""
    problem = study.names("problem")[0]
    layers = sorted(study.names("layer"))
    if len(layers) > FACETS:
        layers = [layers[n] for n in np.unique(np.linspace(0, len(layers) - 1, FACETS).round().astype(int))]
    columns = min(4, len(layers))
    figure = figure_of(2.3 * columns, 2.3 * -(-len(layers) // columns) + 0.4)
    grid = figure.subplots(-(-len(layers) // columns), columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for axes, layer in zip(panels, layers, strict=False):
        for number, method in enumerate(study.names("method")):
            rows = study.chosen(problem=problem, method=method, layer=layer)
            colour, marker = (look(number)[name] for name in ("color", "marker"))
            x, y = (np.array([row[name] for row in rows]) for name in ("effect", "rewrite"))
            axes.scatter(x, y, s=6, color=colour, marker=marker, alpha=0.5, linewidths=0, label=method)
            if len(x) > 1 and np.ptp(x) > 0:
                slope, start = np.polyfit(x, y, 1)
                ends = np.array([x.min(), x.max()])
                axes.plot(ends, start + slope * ends, color=colour, linewidth=1)
            varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
            told = f"{np.corrcoef(x, y)[0, 1]:+.2f}" if varies else "–"
            place = (number + 0.5) / len(study.names("method"))
            axes.text(place, 1.02, told, color=colour, fontsize=6, ha="center", transform=axes.transAxes)
        axes.set_title(f"layer {layer}, r:", fontsize=SMALL, pad=11)
        axes.tick_params(labelsize=6)
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    figure.supxlabel("tracing effect at the edited layer", fontsize=8)
    figure.supylabel(f"rewrite score, {problem.replace('_', ' ')}", fontsize=8)
    legend(figure)
    return figure


def scores_by_layer(study: Localization) -> Figure:
    """Mean of every score by edited layer, a row a problem, a line a method."""
    problems, metrics = study.names("problem"), study.metrics
    layers = sorted(study.names("layer"))
    figure = figure_of(2.2 * len(metrics), 1.8 * len(problems) + 0.4)
    panels = figure.subplots(len(problems), len(metrics), sharex=True, squeeze=False)
    for row, problem in zip(panels, problems, strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            for number, method in enumerate(study.names("method")):
                chosen = [study.chosen(problem=problem, method=method, layer=layer) for layer in layers]
                mean = [np.mean([r[metric] for r in rows]) if rows else np.nan for rows in chosen]
                line(axes, layers, mean, number, method)
            axes.tick_params(labelsize=6)
            axes.set_ylim(min(0.9 if metric == "neighborhood" else 0.0, axes.get_ylim()[0]), 1.02)
    for axes, metric in zip(panels[0], metrics, strict=True):
        axes.set_title(metric.replace("_", " +\n"), fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("edited layer", fontsize=SMALL)
    for row, problem in zip(panels, problems, strict=True):
        row[0].set_ylabel(problem.replace("_", " "), fontsize=SMALL)
    legend(figure)
    return figure


def explained(study: Localization) -> Figure:
    """R^2 of the rewrite score: of the layer, and what the tracing effect adds."""
    problems, methods = study.names("problem"), study.names("method")
    figure = figure_of(1.9 * len(problems) + 0.5, 2.8)
    panels = figure.subplots(1, len(problems), sharey=True, squeeze=False)[0]
    for axes, problem in zip(panels, problems, strict=True):
        for place, method in enumerate(methods):
            (regression,) = (
                r
                for r in study.regressions
                if (r["problem"], r["method"], r["metric"], r["null"]) == (problem, method, "rewrite", True)
            )
            layer, gain = regression["r2_layer"] or 0.0, regression["gain"] or 0.0
            axes.bar(place, layer, color=OKABE_ITO[0], label="layer" if not place else None)
            axes.bar(
                place, gain, bottom=layer, color=OKABE_ITO[1], label="tracing effect beside it" if not place else None
            )
        axes.set_xticks(range(len(methods)), methods, fontsize=6, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_title(problem.replace("_", " "), fontsize=8)
        axes.tick_params(axis="y", labelsize=SMALL)
    panels[0].set_ylabel("R² of the rewrite score", fontsize=8)
    panels[0].set_ylim(0, 1)
    legend(figure)
    return figure
