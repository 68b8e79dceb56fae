"""A page of every sort, and what it was made of."""

from __future__ import annotations

from dataclasses import replace

import knowedit_ext as ke
from knowedit_ext.pages.edits import before_after_page
from knowedit_ext.pages.results import effects_page, report_page, trace_page
from knowedit_ext.pages.study import study_page
from knowedit_ext.studies.suggestion import Suggestion
from knowedit_ext.studies.suggestion_page import suggestion_page

MODEL = ke.load_model("world")
RECORDS = ke.world_records()[:3]
FACT = ke.Fact(RECORDS[0]["requested_rewrite"]["prompt"], RECORDS[0]["requested_rewrite"]["subject"])
TRACES = {kind: ke.trace(MODEL, FACT, kind, samples=3) for kind in ("state", "mlp")}
EDIT = ke.finetune(MODEL, RECORDS[:2], ke.FTParams(layers=[3], num_steps=5, lr=1e-3, weight_decay=0.0))
REPORT = ke.evaluate(MODEL, RECORDS, EDIT, generation=False)
SAID = ke.before_after(MODEL, EDIT, tokens=3)
STUDY = [
    {"method": "unedited", "layer": None, "facts": 4, "S": 1.5, "S_half": None},
    *({"method": m, "layer": n, "facts": 4, "S": 10.0 * n, "S_half": 0.5} for m in ("rome", "memit") for n in (0, 1)),
]
RELATIONS = [
    {"method": m, "relation": r, "S": float(n), "S_half": 0.1}
    for n, (m, r) in enumerate([("rome", "P19"), ("rome", "P103"), ("memit", "P19"), ("memit", "mine")])
]
PRESET = ke.MEMITParams.preset("world")  # layers 1-3, v_lr 0.2
BASE = replace(PRESET, v_lr=0.5)  # what is begun from


def candidate(number: int, params: ke.MEMITParams, score: float | None, records: int) -> dict:
    """As a search's rows: a score, and half the width of its interval."""
    scores = {name: None if score is None else score - n for n, name in enumerate(("S", "ES", "PS", "NS"))}
    half = {f"{name}_half": None if score is None else 1.5 for name in scores}
    layers = params.layers
    told = {"last": layers[-1], "size": len(layers), "records": records, "params": params.to_dict()}
    words = f"{layers[0]}-{layers[-1]}"
    return {"round": number, "layers": words, "v_lr": params.v_lr, **told, **scores, **half, "seconds": 2.0}


FOUND = replace(PRESET, layers=(4,), v_lr=0.1)
SUGGESTION = Suggestion(
    params=FOUND,
    method="memit",
    rows=[
        candidate(1, FOUND, 80.0, 4),
        candidate(1, PRESET, 75.0, 4),
        *(candidate(1, replace(PRESET, layers=(n,), v_lr=rate), 50.0 + 5 * n + 10 * rate, 4)
          for n in range(4) for rate in (0.1, 0.2)),
        candidate(1, BASE, 60.0, 4),
        candidate(1, replace(BASE, layers=(5,)), None, 4),
        candidate(2, FOUND, 78.0, 8),
        candidate(2, PRESET, 76.0, 8),
    ],
    held=[{"candidate": name} | candidate(0, params, score, 8)
          for name, params, score in (("suggested", FOUND, 77.0), ("begun from", BASE, 61.0))],
    difference={"S": 16.0, "S_half": 2.5},
    effect={"facts": 3, "window": 3, "effect": [0.2, 0.3, 0.25, 0.1, 0.05, 0.01], "seconds": 1.0},
    tried=11,
    size=40,
    seconds=90.0,
    settings={"ranges": {"v_lr": [0.1, 0.2, 0.5]}, "begun_from": BASE.to_dict()}
    | {"records": {"searched": 8, "held_out": 8}},
    notes=["layers 5-5, v_lr 0.5: no <b>factor</b>"],
)  # fmt: skip
PAGES = {
    "traces": trace_page(list(TRACES.values())),
    "effects": effects_page(ke.Effects.from_traces(TRACES.values())),
    "report": report_page(REPORT, RECORDS),
    "before and after": before_after_page(SAID),
    "study over layers": study_page("Layers", STUDY, ("method",), {"seed": 1}),
    "study of relations": study_page("Relations", RELATIONS, ("method", "relation"), {}),
    "suggestion": suggestion_page(SUGGESTION),
}
