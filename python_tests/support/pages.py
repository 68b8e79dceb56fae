"""A page of every sort, and what it was made of."""

from __future__ import annotations

import knowedit_ext as ke
from knowedit_ext.pages.edits import before_after_page
from knowedit_ext.pages.results import effects_page, report_page, trace_page
from knowedit_ext.pages.study import study_page

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
PAGES = {
    "traces": trace_page(list(TRACES.values())),
    "effects": effects_page(ke.Effects.from_traces(TRACES.values())),
    "report": report_page(REPORT, RECORDS),
    "before and after": before_after_page(SAID),
    "study over layers": study_page("Layers", STUDY, ("method",), {"seed": 1}),
    "study of relations": study_page("Relations", RELATIONS, ("method", "relation"), {}),
}
