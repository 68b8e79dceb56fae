"""The table of docs/families.md, from `FAMILIES` and what its tiny models give beside plain Hugging Face loops.

    python -m python_tests.support.families_table docs/families.md     (from the repository; a minute)

Writes what lies between the page's two markers anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import transformers

import knowedit_ext as ke
from knowedit_ext.editing.residual import measure_adding
from knowedit_ext.evaluation.nll import score
from knowedit_ext.model.families import FAMILIES
from knowedit_ext.sweep.whole import mixes_whole

from ..evaluation.test_nll import plain, some_questions
from ..tracing.test_against_the_loop import FACTS, IDS, NOISE, noisy
from .families import CONFIGS, tiny_model
from .more_families import known, more_model
from .oracle import plain_trace

START, END = "<!-- table: python -m python_tests.support.families_table -->\n", "<!-- end of table -->\n"


def row(family: str) -> str:
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
    name = type(model.hf).__name__
    return f"| `{family}` | {name} | {_error(off)} | {_error(apart)} | {edits} | {'; '.join(notes)} |\n"


def _edits(model: ke.EditableModel) -> tuple[str, list[str]]:
    try:
        adding = measure_adding(model, range(model.num_layers))[0]
    except ke.UnsupportedModelError:
        experts = "mlp" not in model.modules.family.without
        return "no", ["mixture of experts"] if experts else ["no MLP"]
    except ValueError:
        return "all but MEMIT and its kin", ["changes the MLP's output before adding it"]
    notes = [] if adding.weight is None else ["norm behind the MLP: MEMIT aims through it"]
    return "all", notes + ([] if adding.factor == 1.0 else ["multiplies the MLP's output"])


def _error(value: float) -> str:
    if not value <= 1e-5:
        raise SystemExit(f"off by {value}")
    return f"{value:.0e}"


def table() -> str:
    head = "| model_type | class | trace off by | scores off by | edits | |\n|---|---|---|---|---|---|\n"
    rows = [row(family) for family in sorted(FAMILIES) if family in CONFIGS or family in known({family: {}})]
    return f"transformers {transformers.__version__}, {len(rows)} families:\n\n{head}{''.join(rows)}"


def main(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{START}{table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
