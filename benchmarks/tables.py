"""The papers' table, all rows, by one command.

    python benchmarks/tables.py world --out benchmarks/results/tables/world.md [--limit 100]
    python benchmarks/tables.py counterfact --model DIR --out benchmarks/results/tables/counterfact.md

world        the built-in world's facts, all columns: texts are generated and compared with the world's snippets
counterfact  the 350 real CounterFact records, on a model that knows them (`benchmarks/counterfact_model.py`); no
             generation. The table says how many the model knows before.

MEMIT and AlphaEdit edit all facts at once, the others one at a time. KE and MEND are trained on texts with another's
last word, -CF on records whose subjects are not edited: of other people in the world; of the other half of the real
records, each half edited by an editor that was trained on the other. A run that was killed goes on in --work.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from evaluation import DATA
from trained_editors import PARAMS, RANK, edits_by, of_other_people, trained, unlike

import knowedit_ext as ke
from knowedit_ext.datasets import load_counterfact, load_snippets
from knowedit_ext.editing.methods import METHODS
from knowedit_ext.editing.params import LayerParams
from knowedit_ext.evaluation.methods import Editing
from knowedit_ext.evaluation.report import side_by_side
from knowedit_ext.runs.files import atomic_write, write_json
from knowedit_ext.world import load_world

NAMES = {
    "none": "unedited",
    "ft": "FT",
    "ft-l": "FT+L",
    "kn": "KN",
    "ke": "KE",
    "ke-cf": "KE-CF",
    "mend": "MEND",
    "mend-cf": "MEND-CF",
    "rome": "ROME",
    "memit": "MEMIT",
    "alphaedit": "AlphaEdit",
}
EDITORS = {"ke": "efk", "ke-cf": "efk", "mend": "mend", "mend-cf": "mend"}
TABLE = tuple(name for name in NAMES if name != "none" and name not in EDITORS)
HERE = Path(__file__).resolve().parent
KEYS_A_WIDTH = 100  # second moments over so many keys for each of their dimensions, where there is so much text
LN2 = math.log(2)


def world_setting(limit: int) -> dict[str, Any]:
    world = load_world()
    return {
        "model": ke.load_model(world.folder, dtype="float32"),
        "records": world.records()[:limit],
        "texts": world.statements(),
        "params": {name: METHODS[name].params_of("world") for name in TABLE},
        "evaluate": {"snippets": load_snippets(world.snippets())},
        "about": [],
        "pool": world.records(),
        "folds": 1,
    }


def counterfact_setting(folder: Path, limit: int | None) -> dict[str, Any]:
    from counterfact_statements import collect, read_data

    model = ke.load_model(folder, dtype="float32")
    records = load_counterfact(DATA / "counterfact_350.json", limit=limit)
    known = [asked[0]["target_true"] < LN2 for asked in own_prompts(model, records)]
    knowledge = collect(*read_data(DATA))
    statements = [f"{s.prompt()} {s.object}." for s in knowledge.asked] + knowledge.prose
    random.Random(3).shuffle(statements)
    return {
        "model": model,
        "records": records,
        "texts": statements,
        "params": {name: METHODS[name].params_of(HERE / "counterfact_params" / f"{name}.json") for name in TABLE},
        "evaluate": {"generation": False},
        "pool": records,
        "folds": 2,
        "about": [
            f"Before any edit the model gives the true object more than half of the probability in "
            f"{sum(known)} of {len(records)} records; it was trained on their statements."
        ],
    }


def own_prompts(model: ke.EditableModel, records: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
    report = ke.evaluate(model, records, generation=False, progress=True)
    return [case["pre"]["rewrite_prompts_probs"] for case in report.cases]


def make(setting: dict[str, Any], work: Path) -> dict[str, ke.Report]:
    """A report for each method; the unedited model is measured once."""
    model, records, params = setting["model"], setting["records"], setting["params"]
    layers = sorted({*params["rome"].layers, *params["memit"].layers})
    width = model.modules.down_projection(0).weight.shape[0]
    moments = ke.collect_moments(model, setting["texts"], layers, max_tokens=KEYS_A_WIDTH * width, out=work / "moments")
    reports = {"none": run(setting, None, work / "none")}
    for method in list(NAMES)[1:]:
        if method in EDITORS:
            edits: Any = by_trained(setting, method, work / "editors")
            reports[method] = run(setting, edits, work / method, baseline=False)
        else:
            chosen, together = params[method], METHODS[method].many
            edits = Editing(model, method, chosen, moments if METHODS[method].takes("moments") else None, together)
            group = {"group": len(records)} if together else {}
            reports[method] = run(setting, edits, work / method, baseline=False, **group)
        print(side_by_side({NAMES[name]: report for name, report in reports.items()}), flush=True)
    return reports


def by_trained(setting: dict[str, Any], name: str, work: Path) -> list[ke.Edit]:
    """An edit of each record; no editor has learnt by a record of its subject."""
    model, records = setting["model"], setting["records"]
    if not name.endswith("-cf"):
        editor = trained(model, EDITORS[name], unlike(setting["texts"]), setting["texts"], work / name)
        return edits_by(model, editor, records)
    edits: list[ke.Edit] = []
    size = -(-len(records) // setting["folds"])
    for first in range(0, len(records), size):
        part = records[first : first + size]
        others = of_other_people(setting["pool"], part)
        editor = trained(model, EDITORS[name], others, setting["texts"], work / f"{name}{first}")
        edits += edits_by(model, editor, part)
    return edits


def run(setting: dict[str, Any], editing: Editing | list[ke.Edit] | None, out: Path, **settings: Any) -> ke.Report:
    return ke.evaluate(
        setting["model"], setting["records"], editing, out=out, progress=True, **setting["evaluate"], **settings
    )


def described(params: dict[str, LayerParams]) -> str:
    lines = ["| method | parameters |", "|---|---|"]
    for method in TABLE:
        chosen = params[method]
        settings = {k: v for k, v in chosen.to_dict().items() if v != getattr(type(chosen)(layers=(0,)), k, None)}
        lines.append(f"| {NAMES[method]} | `{json.dumps(settings)}` |")
    training = {k: v for k, v in asdict(PARAMS).items() if v != getattr(ke.EditorTrainingParams(), k)}
    lines.append(f"| KE, MEND | `{json.dumps(training)}`, MEND's rank {RANK} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=("world", "counterfact"))
    parser.add_argument(
        "--out", type=Path, required=True, help="the table (.md); a .json of all numbers goes beside it"
    )
    parser.add_argument("--model", type=Path, help="folder of a model that knows the records (counterfact)")
    parser.add_argument(
        "--limit", type=int, help="only the first N records; default: 100 of the world's, all real ones"
    )
    parser.add_argument("--work", type=Path, help="folder to go on in after a kill; default: a temporary one")
    args = parser.parse_args()
    if args.setting == "counterfact" and args.model is None:
        parser.error("counterfact needs --model (see benchmarks/counterfact_model.py)")
    torch.manual_seed(0)
    setting = (
        world_setting(args.limit or 100) if args.setting == "world" else counterfact_setting(args.model, args.limit)
    )
    setting["model"].name = args.setting  # and not where it lies on this machine
    with tempfile.TemporaryDirectory() as temporary:
        reports = make(setting, args.work or Path(temporary))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    limit = f" --limit {args.limit}" if args.limit else ""
    command = f"python benchmarks/tables.py {args.setting}{' --model DIR' if args.model else ''}{limit}"
    count = len(setting["records"])
    parts = [
        f"`{command}` at {commit}; {count} records, standard errors in brackets. MEMIT and AlphaEdit: {count} "
        "edits at once, the others one at a time.",
        *setting["about"],
        side_by_side({NAMES[name]: report for name, report in reports.items()}).rstrip(),
        described(setting["params"]),
    ]
    atomic_write(args.out, lambda file: file.write(("\n\n".join(parts) + "\n").encode()))
    write_json(args.out.with_suffix(".json"), {NAMES[name]: report.to_dict() for name, report in reports.items()})


if __name__ == "__main__":
    main()
