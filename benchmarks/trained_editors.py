"""MEND and KE trained on the world's facts, and measured on facts of other people: rows for the papers' table.

    python benchmarks/trained_editors.py --work DIR --out benchmarks/results/tables/world_editors.md [--method mend]

A training that was killed goes on in --work. No subject is both trained on and evaluated.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import knowedit_ext as ke
from knowedit_ext.datasets.records import Record
from knowedit_ext.editors.data import split_records
from knowedit_ext.runs.files import atomic_write
from knowedit_ext.world import load_world

EVALUATED, RANK, FIELDS = 30, 64, ("ES", "PS", "NS")
PARAMS = ke.EditorTrainingParams(
    iterations=600,
    lr=1e-4,
    lr_lr=1e-4,
    accumulate_bs=5,
    loc_texts=2,
    val_interval=100,
    val_edits=20,
    edit_tokens=4,
    seed=0,
)


def of_other_people(records: Sequence[Record], evaluated: Sequence[Record]) -> list[Record]:
    """Those that share no subject with what is evaluated."""
    subjects = {record["requested_rewrite"]["subject"] for record in evaluated}
    return [record for record in records if record["requested_rewrite"]["subject"] not in subjects]


def unlike(texts: Sequence[str]) -> list[str]:
    """Each with the last word of another: texts that the model does not say, as those of the published editors."""
    ends = [text.rsplit(" ", 1)[-1] for text in texts]
    random.Random(0).shuffle(ends)
    return [f"{text.rsplit(' ', 1)[0]} {end}" for text, end in zip(texts, ends, strict=True) if " " in text]


def trained(
    model: ke.EditableModel,
    method: str,
    sources: Sequence[Record | str],
    texts: Sequence[str],
    out: Path,
    params: ke.EditorTrainingParams = PARAMS,
) -> ke.MEND | ke.EFK:
    """sources: records, or texts."""
    editor = ke.MEND.new(model, rank=RANK) if method == "mend" else ke.EFK.new(model)
    return ke.train_editor(model, editor, sources, texts, params, out, progress=True)


def edits_by(model: ke.EditableModel, editor: ke.MEND | ke.EFK, records: Sequence[Record]) -> list[ke.Edit]:
    if isinstance(editor, ke.MEND):
        return ke.mend_each(model, records, editor)
    return [ke.efk(model, record, editor) for record in records]


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
    params = replace(PARAMS, iterations=args.iterations)
    lines = [
        "`python benchmarks/trained_editors.py --work DIR --out FILE`",
        "",
        f"{len(train)} facts to train on and validate by, {len(evaluated)} of other people evaluated; "
        f"{params.iterations} iterations, MEND's rank {RANK}.",
        "",
        "| editor | ES | PS | NS | minutes of training |",
        "|---|--:|--:|--:|--:|",
    ]
    for method in args.method:
        begun = time.perf_counter()
        editor = trained(model, method, train, world.statements(), args.work / method, params)
        minutes = (time.perf_counter() - begun) / 60
        edits = edits_by(model, editor, evaluated)
        report = ke.evaluate(model, evaluated, edits, generation=False, baseline=False)
        scores = report.summary("post")
        shown = " | ".join(f"{scores[field].mean:.1f}" for field in FIELDS)
        lines.append(f"| {'MEND' if method == 'mend' else 'KE'} | {shown} | {minutes:.1f} |")
        text = "\n".join(lines) + "\n"
        atomic_write(args.out, lambda file, text=text: file.write(text.encode()))
        print(lines[-1], flush=True)


if __name__ == "__main__":
    main()
