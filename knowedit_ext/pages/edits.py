"""The page of what a model says before an edit and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..plots import shown_text
from .charts import bars
from .page import Chart, Page, Table

if TYPE_CHECKING:
    from ..evaluation.before_after import BeforeAfter, Said


def before_after_page(said: BeforeAfter) -> Page:
    """For each prompt the likeliest next tokens of both sides and their probabilities, and the text that goes on."""
    sides = {"before": said.before} | ({} if said.after is None else {"after": said.after})
    charts = []
    for n, prompt in enumerate(said.prompts):
        here = {side: each[n] for side, each in sides.items()}
        charts.append(_prompt(shown_text(prompt), here))
    rows = [[shown_text(prompt), *(shown_text(each[n].text) for each in sides.values())]
            for n, prompt in enumerate(said.prompts)]  # fmt: skip
    texts = Table("What goes on from each prompt", ["prompt", *sides], rows)
    title = "What the model says" if said.after is None else "Before and after the edit"
    return Page(title, said.edit, charts, [texts], switch="Prompt")


def _prompt(prompt: str, sides: dict[str, Said]) -> Chart:
    of_sides = {side: each.chances() for side, each in sides.items()}
    tokens = list(dict.fromkeys(token for chances in of_sides.values() for token in chances))
    names = [shown_text(token) if token.strip() else repr(token) for token in tokens]
    traces = []
    for number, (side, chances) in enumerate(of_sides.items()):
        p = [chances.get(token) for token in tokens]
        told = [f"{side}, {name}: {'less than those shown' if x is None else f'{x:.4f}'}"
                for name, x in zip(names, p, strict=True)]  # fmt: skip
        traces.append(bars(number, side, names, p, [None] * len(p), told))
    columns = ["next token", *(f"p {side}" for side in sides)]
    of_tokens = [[name, *(chances.get(token) for chances in of_sides.values())]
                 for name, token in zip(names, tokens, strict=True)]  # fmt: skip
    tables = [Table(f"Likeliest next tokens: {prompt}", columns, of_tokens)]
    if targets := list(next(iter(sides.values())).targets):
        of_targets = [[shown_text(t), *(each.targets[t] for each in sides.values())] for t in targets]
        tables.insert(0, Table("Targets", ["target", *(f"p {side}" for side in sides)], of_targets))
    layout = {"yaxis": {"title": {"text": "probability"}, "range": [0, 1]}, "barmode": "group"}
    return Chart(prompt, traces, layout, tables)
