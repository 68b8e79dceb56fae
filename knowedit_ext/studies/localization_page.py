"""A study of localization as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .localization_results import Localization

FIGURES = {
    "effect_by_layer": "Tracing effect by layer",
    "peaks": "Where facts peak",
    "score_against_effect": "Rewrite score against tracing effect, by edited layer",
    "scores_by_layer": "Scores by edited layer",
    "explained": "What explains the rewrite score",
}
STYLE = """body{font:14px/1.45 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:12px}td,th{border:1px solid #ccc;padding:2px 6px;text-align:right}
td:first-child,td:nth-child(2),th:first-child{text-align:left}img{max-width:100%}pre{font-size:11px;background:#f5f5f5;
padding:.6em;overflow-x:auto}"""
REGRESSION = ("problem", "method", "metric", "null", "n", "r2_layer", "r2_trace", "r2_both", "gain", "f", "p")


def page(study: Localization, figures: Path) -> str:
    """figures: the folder with their .png files."""
    parts = ["<h1>Does localization inform editing?</h1>", _facts(study)]
    for name, title in FIGURES.items():
        image = base64.b64encode((figures / f"{name}.png").read_bytes()).decode()
        parts.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{image}">')
    parts.append("<h2>R² of the layer, of the tracing effect, of both; F test of both against the layer</h2>")
    parts.append("<p>null: with the edits that could change nothing, no layer being behind them.</p>")
    parts.append(_table(REGRESSION, study.regressions))
    parts.append("<h2>Correlation of rewrite score and tracing effect at each layer</h2>")
    parts.append(_correlations(study))
    means = study.means()
    parts.append("<h2>Mean scores</h2>" + _table([n for n in means[0] if not n.endswith("_sd")], means))
    settings = escape(json.dumps(study.settings, indent=1, sort_keys=True))
    parts.append(f"<h2>Settings</h2><pre>{settings}</pre>")
    body = "\n".join(parts)
    return f'<!doctype html><meta charset="utf-8"><title>Localization</title><style>{STYLE}</style>\n{body}\n'


def _facts(study: Localization) -> str:
    text = f"{len(study.effects)} facts, {len(study.rows)} edits, of which {len(study.chosen(null=True))} null."
    if study.left_out:
        text += f" {len(study.left_out)} problems could not be asked: {study.left_out[0]['reason']}"
    return f"<p>{escape(text)}</p>"


def _correlations(study: Localization) -> str:
    layers = [str(layer) for layer in sorted(study.names("layer"))]
    rows = [
        {"problem": r["problem"], "method": r["method"], **(r["correlation"] or {})}
        for r in study.regressions
        if r["metric"] == "rewrite" and r["null"]
    ]
    return _table(["problem", "method", *layers], rows)


def _table(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    columns = list(columns)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_shown(row.get(name))}</td>' for name in columns)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))
