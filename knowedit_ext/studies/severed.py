"""Severed paths over a data set (Meng et al. 2022, section 2): a state's effect without MLP, or attention."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import Count, Natural, typed
from ..datasets import KnownFact, load_known
from ..model.hooks import at_rest
from ..model.identity import identity
from ..model.load import EditableModel
from ..plots import figure_of
from ..runs.settings import marked
from ..tracing.corruption import noise_of
from ..tracing.dataset import trace_dataset
from .cells import Cell, Results, run_cells
from .findings import HALF, Findings
from .plots import legend, line_of_rows, named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = (None, "mlp", "attn")
ORDINARY = "ordinary"
ROLE = "Last subject token"


@at_rest
@typed
def severed(
    model: EditableModel,
    facts: Any,
    out: str | Path,
    *,
    limit: Count | None = None,
    samples: Count = 10,
    noise: float | str = "s3",
    seed: Natural = 1,
    compat: str | None = None,
    group: Count = 8,
    progress: bool = False,
) -> Findings:
    """Restore single states, as they are, and with the restored token's MLP or attention at its corrupted outputs.

    facts, samples, noise, seed, compat, group: as in `trace_dataset`. limit: only the first so many facts; with more
    of them a rule such as "s3" is another level: give the number to enlarge a study. Rows: path
    ("ordinary", "mlp", "attn"), role of the token, layer, and the average indirect effect with the half width of its
    95 % interval.
    """
    known = load_known(facts)[:limit]
    level = noise_of(model, noise, [item.fact.subject for item in known]).level
    noise = noise if isinstance(noise, str) and noise.startswith("u") else level
    study = {"run": "severed", "model": identity(model), "noise": noise, "samples": samples, "seed": seed}
    study |= {"compat": compat, "group": group}
    told = {"facts": marked(*(repr(_told(item)) for item in known))}
    cells = [Cell({"path": way or ORDINARY, "facts": len(known)}, told) for way in WAYS]

    def compute(cell: Cell, folder: Path) -> dict[str, Any]:
        way = None if cell.key["path"] == ORDINARY else cell.key["path"]
        options = dict(samples=samples, noise=noise, seed=seed, compat=compat, group=group, progress=progress)
        facts_again = [item.fact for item in known]
        effects = trace_dataset(model, facts_again, folder / "traces", kinds=("state",), sever=way, **options)
        kind = effects.kinds.get("state")
        if kind is None:
            raise ValueError(f"the model says none of the {len(known)} facts: there is nothing to trace")
        return {"cases": kind.cases, "aie": {role: asdict(mean) for role, mean in kind.aie.items()}}

    find = partial(_findings, settings={**study, "facts": len(known)})
    finish = lambda results: find(results).save(out)  # noqa: E731
    return find(run_cells(out, study, cells, compute, finish))


def _told(item: KnownFact) -> tuple[Any, ...]:
    return item.known_id, item.fact


def _findings(results: Results, settings: dict[str, Any]) -> Findings:
    rows = []
    for cell, result in results:
        for role, mean in result["aie"].items():
            for layer, value in enumerate(mean["mean"]):
                half = None if mean["half_width"] is None else mean["half_width"][layer]
                row = {"path": cell.key["path"], "role": role, "layer": layer, "facts": result["cases"], "aie": value}
                rows.append({**row, f"aie{HALF}": half})
    return Findings(rows, settings, ("path", "role"), {"severed": curves})


def curves(study: Findings) -> Figure:
    """Average indirect effect of the last subject token's state by layer, a line a path, with 95 % bands."""
    figure = figure_of(4.6, 3.0)
    axes = figure.add_subplot()
    labels = {ORDINARY: "ordinary", "mlp": "MLP severed", "attn": "attention severed"}
    for number, (path, label) in enumerate(labels.items()):
        line_of_rows(axes, study.chosen(path=path, role=ROLE), "layer", "aie", number, label)
    axes.axhline(0, color="0.7", linewidth=0.6)
    named(axes, "restored layer", "average indirect effect", f"{ROLE}, {study.rows[0]['facts']} facts")
    legend(figure)
    return figure
