"""How well attribution estimates what tracing finds exactly, and what each costs.

    python benchmarks/attribution.py world [--facts 50] [--out benchmarks/results/cpu/attribution_world.json]
    python benchmarks/attribution.py FOLDER --data known_1000.json
    python benchmarks/attribution.py --traced EXACT ESTIMATED        # two folders of `knowedit trace`: what is in both

Facts that the model says; noise "s3" of all of them, 10 samples (folders: as they were traced); the correlation is over
a map's cells from the subject on, and over the mean map by token's role of all facts.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from time import perf_counter

import numpy as np

import knowedit_ext as ke
from knowedit_ext.datasets import load_known
from knowedit_ext.model.facts import tokenize_fact
from knowedit_ext.tracing.answer import knows
from knowedit_ext.tracing.kinds import KINDS
from knowedit_ext.tracing.trace import was_predicted
from knowedit_ext.world import load_world


def measure(model: ke.EditableModel, facts: list[ke.Fact], score: str, best: int) -> dict[str, dict[str, float]]:
    """By kind: correlations, the share of the `best` strongest cells that are among the estimates' `best`, seconds."""
    level = ke.noise_level(model, "s3", [fact.subject for fact in facts])
    rows = {}
    for kind in KINDS:
        seconds, traces = {}, {}
        for method in ("exact", "attribution"):
            began = perf_counter()
            traces[method] = [ke.trace(model, fact, kind, noise=level, score=score, method=method) for fact in facts]
            seconds[method] = (perf_counter() - began) / len(facts)
        pairs = list(zip(traces["exact"], traces["attribution"], strict=True))
        rows[kind] = compared(pairs, best) | {f"s, {method}": taken for method, taken in seconds.items()}
    return rows


def compared(pairs: list[tuple[ke.Trace, ke.Trace]], best: int) -> dict[str, float]:
    """Exact and estimated, of the same facts."""
    each, found, roles = [], [], ([], [])
    for pair in pairs:
        first, after = pair[0].subject_range
        a, b = (trace.indirect_effect[first:].ravel() for trace in pair)
        if np.ptp(a) > 0:
            each.append(np.corrcoef(a, b)[0, 1])
            found.append(len({*np.argsort(-a)[:best]} & {*np.argsort(-b)[:best]}) / best)
        for rows, trace in zip(roles, pair, strict=True):
            effect = trace.indirect_effect
            rows.append([effect[after - 1], effect[-1], effect[first:after].mean(0)])
    return {
        "median": float(np.median(each)),
        "tenth": float(np.quantile(each, 0.1)),
        "mean map": float(np.corrcoef(*(np.mean(rows, axis=0).ravel() for rows in roles))[0, 1]),
        f"of best {best}": float(np.mean(found)),
    }


def traced(exact: Path, estimated: Path, best: int) -> tuple[int, dict[str, dict[str, float]]]:
    """How many facts two folders have in common, and what `compared` says of them."""
    rows = {}
    for name, kind in KINDS.items():
        pairs = []
        for path in sorted((exact / "cases").glob(f"knowledge_*{kind.suffix}.npz")):
            other = estimated / "cases" / path.name
            if path.stem.removesuffix(kind.suffix).removeprefix("knowledge_").isdigit() and other.exists():
                pairs += [(ke.Trace.load(path), ke.Trace.load(other))] if was_predicted(path) else []
        rows[name] = compared(pairs, best)
    return len(pairs), rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", nargs="?")
    options.add_argument("--traced", type=Path, nargs=2, metavar=("EXACT", "ESTIMATED"))
    options.add_argument("--data", type=Path)
    options.add_argument("--facts", type=int, default=50)
    options.add_argument("--score", default="probability")
    options.add_argument("--best", type=int, default=10)
    options.add_argument("--out", type=Path)
    asked = options.parse_args()
    warnings.simplefilter("ignore")
    if asked.traced:
        tell(*traced(*asked.traced, asked.best), asked)
        return
    world = asked.model == "world"
    model = ke.load_model(load_world().folder if world else asked.model, dtype="float32")
    facts = []
    for item in load_known(load_world().facts() if world else asked.data):
        if len(facts) < asked.facts and knows(model, tokenize_fact(model, item.fact), 1):
            facts.append(item.fact)
    tell(len(facts), measure(model, facts, asked.score, asked.best), asked)


def tell(facts: int, rows: dict[str, dict[str, float]], asked: argparse.Namespace) -> None:
    print(f"{facts} facts\n")
    names = list(next(iter(rows.values())))
    print("| kind | " + " | ".join(names) + " |\n|---|" + "--:|" * len(names))
    for kind, row in rows.items():
        print(f"| {kind} | " + " | ".join(f"{value:.3g}" for value in row.values()) + " |")
    if asked.out:
        asked.out.write_text(json.dumps({"facts": facts, "score": asked.score, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
