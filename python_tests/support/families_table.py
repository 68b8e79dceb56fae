"""The tables of docs/families.md and README.md, from what tiny models of all families give beside Hugging Face loops.

    python -m python_tests.support.families_table docs/families.md README.md     (from the repository; a minute)

Writes what lies between a page's markers anew: one line a family ("table"), or those alike together ("summary").
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import transformers

import knowedit_ext as ke
from knowedit_ext.editing.residual import measure_adding
from knowedit_ext.evaluation.nll import score
from knowedit_ext.sweep.whole import mixes_whole

from ..evaluation.test_nll import plain, some_questions
from ..tracing.test_against_the_loop import FACTS, IDS, NOISE, noisy
from .families import CONFIGS, tiny_model
from .more_families import DENSE, EXPERTS, known, more_model
from .oracle import plain_trace

COMMAND = "python -m python_tests.support.families_table"


@dataclass(frozen=True)
class Row:
    family: str
    name: str  # of its class
    trace_off: float
    scores_off: float
    edits: str
    notes: tuple[str, ...]


def row(family: str) -> Row:
    model = tiny_model(family) if family in CONFIGS else more_model(family)
    trace = ke.trace(model, FACTS[0], samples=3, noise=NOISE)
    off = np.abs(trace.scores - plain_trace(model.hf, IDS[0], noisy(0), trace.answer_ids).scores).max()
    questions = some_questions(3)
    wanted = [nll for question in questions for nll, _ in plain(model, question)]
    apart = max(
        abs(x.nll - y) for x, y in zip((x for xs in score(model, questions)[0] for x in xs), wanted, strict=True)
    )
    edits, notes = _edits(model)
    if mixes_whole(model.modules):
        notes.append("its mixing of tokens runs whole sequences: slower")
    notes += [f"no traces of {site} outputs" for site in model.modules.family.without]
    for error in (off, apart):
        if not error <= 1e-5:
            raise SystemExit(f"{family} is off by {error}")
    return Row(family, type(model.hf).__name__, off, apart, edits, tuple(notes))


def _edits(model: ke.EditableModel) -> tuple[str, list[str]]:
    try:
        adding = measure_adding(model, range(model.num_layers))[0]
    except ke.UnsupportedModelError:
        experts = "mlp" not in model.modules.family.without
        return "no", ["mixture of experts"] if experts else ["no single MLP"]
    except ValueError:
        return "all but MEMIT and its kin", ["changes the MLP's output before adding it"]
    notes = [] if adding.weight is None else ["norm behind the MLP: MEMIT aims through it"]
    return "all", notes + ([] if adding.factor == 1.0 else ["multiplies the MLP's output"])


def table(rows: list[Row]) -> str:
    lines = [
        f"| `{r.family}` | {r.name} | {r.trace_off:.0e} | {r.scores_off:.0e} | {r.edits} | {'; '.join(r.notes)} |\n"
        for r in rows
    ]
    head = "| model_type | class | trace off by | scores off by | edits | |\n|---|---|---|---|---|---|\n"
    return f"transformers {transformers.__version__}, {len(rows)} families:\n\n{head}{''.join(lines)}"


def summary(rows: list[Row]) -> str:
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for r in rows:
        alike[r.edits, r.notes].append(f"`{r.family}`")
    lines = [
        f"| {' '.join(names)} | yes | yes | {edits} | {'; '.join(notes)} |\n"
        for (edits, notes), names in sorted(alike.items(), key=lambda item: (item[0][0], -len(item[1])))
    ]
    worst = max(max(r.trace_off, r.scores_off) for r in rows)
    head = "| model_type | trace | evaluate | edit, by | notes |\n|---|---|---|---|---|\n"
    shown = f"{len(rows)} families, none further than {worst:.0e} from a plain loop over its own class"
    return f"{shown}:\n\n{head}{''.join(lines)}"


def main(pages: list[Path]) -> None:
    rows = [row(family) for family in sorted([*CONFIGS, *known(DENSE), *known(EXPERTS)])]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for kind, made in (("table", table), ("summary", summary)):
            start, end = f"<!-- {kind}: {COMMAND} -->\n", f"<!-- end of {kind} -->\n"
            if start in text:
                before, _, rest = text.partition(start)
                text = before + start + made(rows) + end + rest.partition(end)[2]
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main([Path(page) for page in sys.argv[1:]])
