"""How well attribution estimates what tracing finds exactly, and what each costs.

    python benchmarks/attribution.py world [--facts 50] [--out benchmarks/results/cpu/attribution_world.json]
    python benchmarks/attribution.py FOLDER --data known_1000.json

Facts that the model says; noise "s3" of all of them, 10 samples; the correlation is over a map's cells from the subject
on, and over the mean map by token's role of all facts.
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
        each, found, roles = [], [], {"exact": [], "attribution": []}
        for exact, estimated in zip(traces["exact"], traces["attribution"], strict=True):
            first, after = exact.subject_range
            a, b = (t.indirect_effect[first:].ravel() for t in (exact, estimated))
            if np.ptp(a) > 0:
                each.append(np.corrcoef(a, b)[0, 1])
                found.append(len({*np.argsort(-a)[:best]} & {*np.argsort(-b)[:best]}) / best)
            for method, trace in zip(roles, (exact, estimated), strict=True):
                effect = trace.indirect_effect
                roles[method].append([effect[after - 1], effect[-1], effect[first:after].mean(0)])
        mean = [np.mean(roles[method], axis=0).ravel() for method in roles]
        rows[kind] = {
            "median": float(np.median(each)),
            "tenth": float(np.quantile(each, 0.1)),
            "mean map": float(np.corrcoef(*mean)[0, 1]),
            f"of best {best}": float(np.mean(found)),
            **{f"s, {method}": taken for method, taken in seconds.items()},
        }
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("--data", type=Path)
    options.add_argument("--facts", type=int, default=50)
    options.add_argument("--score", default="probability")
    options.add_argument("--best", type=int, default=10)
    options.add_argument("--out", type=Path)
    asked = options.parse_args()
    warnings.simplefilter("ignore")
    world = asked.model == "world"
    model = ke.load_model(load_world().folder if world else asked.model, dtype="float32")
    facts = []
    for item in load_known(load_world().facts() if world else asked.data):
        if len(facts) < asked.facts and knows(model, tokenize_fact(model, item.fact), 1):
            facts.append(item.fact)
    rows = measure(model, facts, asked.score, asked.best)
    print(f"{len(facts)} facts")
    print("| kind | " + " | ".join(next(iter(rows.values()))) + " |")
    for kind, row in rows.items():
        print(f"| {kind} | " + " | ".join(f"{value:.3g}" for value in row.values()) + " |")
    if asked.out:
        asked.out.write_text(json.dumps({"facts": len(facts), "score": asked.score, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
