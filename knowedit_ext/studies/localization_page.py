"""The page of a study of localization: mean scores by layer, and what explains the scores of single edits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..pages.page import Page, Table
from ..pages.study import study_page
from .findings import HALF

if TYPE_CHECKING:
    from .localization_results import Localization

REGRESSION = ("problem", "method", "metric", "null", "n", "r2_layer", "r2_trace", "r2_both", "gain", "f", "p")


def localization_page(study: Localization) -> Page:
    means = []
    for mean in study.means():
        row = {name: value for name, value in mean.items() if not name.endswith("_sd")}
        spread = {name.removesuffix("_sd"): value for name, value in mean.items() if name.endswith("_sd")}
        half = {n + HALF: None if sd is None else 1.96 * sd / mean["n"] ** 0.5 for n, sd in spread.items()}
        means.append(row | half)
    page = study_page(
        "Does localization inform editing?", means, ("problem", "method"), study.settings, study.lead(), split="problem"
    )
    return replace(page, tables=[_regressions(study), _correlations(study), *page.tables])


def _regressions(study: Localization) -> Table:
    caption = (
        "R² of the layer, of the tracing effect, of both, and F test of both against the layer "
        "(null: with the edits that could change nothing, no layer being behind them)"
    )
    rows = [[_said(row[name]) for name in REGRESSION] for row in study.regressions]
    return Table(caption, REGRESSION, rows)


def _correlations(study: Localization) -> Table:
    """Of rewrite score and tracing effect at each layer."""
    layers = [str(layer) for layer in sorted(study.names("layer"))]
    rows = [
        [row["problem"], row["method"], *((row["correlation"] or {}).get(layer) for layer in layers)]
        for row in study.regressions
        if row["metric"] == "rewrite" and row["null"]
    ]
    heads = ["problem", "method", *(f"layer {layer}" for layer in layers)]
    return Table("Correlation of rewrite score and tracing effect at each layer", heads, rows)


def _said(value: object) -> object:
    return ("yes" if value else "no") if isinstance(value, bool) else value
