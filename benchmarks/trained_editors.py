"""MEND and KE trained on the world's facts, and measured on facts of other people: rows for the papers' table.

    python benchmarks/trained_editors.py --work DIR --out benchmarks/results/tables/world_editors.md [--method mend]

A training that was killed goes on in --work. No subject is both trained on and evaluated.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import knowedit_ext as ke
from knowedit_ext.editors.data import split_records
from knowedit_ext.runs.files import atomic_write
from knowedit_ext.world import load_world

EVALUATED, RANK, FIELDS = 30, 64, ("ES", "PS", "NS")
PARAMS = ke.EditorTrainingParams(
    iterations=600, lr=1e-4, lr_lr=1e-4, accumulate_bs=5, loc_texts=2, val_interval=100, val_edits=20, seed=0
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", nargs="+", choices=["mend", "efk"], default=["mend", "efk"])
    parser.add_argument("--iterations", type=int, default=PARAMS.iterations)
    args = parser.parse_args()
    world = load_world()
    records = world.records()
    random.Random(0).shuffle(records)
    train, evaluated = split_records(records, EVALUATED)
    model = ke.load_model(world.folder, dtype="float32")
    params = ke.EditorTrainingParams(**{**PARAMS.__dict__, "iterations": args.iterations})
    lines = [
        f"{len(train)} facts to train on and validate by, {len(evaluated)} of other people evaluated; "
        f"{params.iterations} iterations, rank {RANK}.",
        "",
        "| editor | ES | PS | NS | minutes of training |",
        "|---|--:|--:|--:|--:|",
    ]
    for method in args.method:
        editor = ke.MEND.new(model, rank=RANK) if method == "mend" else ke.EFK.new(model)
        begun = time.perf_counter()
        texts = world.statements()
        editor = ke.train_editor(model, editor, train, texts, params, args.work / method, progress=True)
        minutes = (time.perf_counter() - begun) / 60
        if method == "mend":
            edits = ke.mend_each(model, evaluated, editor)
        else:
            edits = [ke.efk(model, record, editor) for record in evaluated]
        report = ke.evaluate(model, evaluated, edits, generation=False, baseline=False)
        scores = report.summary("post")
        shown = " | ".join(f"{scores[field].mean:.1f}" for field in FIELDS)
        lines.append(f"| {'MEND' if method == 'mend' else 'KE'} | {shown} | {minutes:.1f} |")
        text = "\n".join(lines) + "\n"
        atomic_write(args.out, lambda file, text=text: file.write(text.encode()))
        print(lines[-1], flush=True)


if __name__ == "__main__":
    main()
