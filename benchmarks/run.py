"""Speed of the package against the published loops, in one process and one run, after a check that both agree.

    python benchmarks/run.py trace [--check] [--repeat 3] [--out benchmarks/results/x.json]

Reports medians.

trace   state map of a GPT-2-small-sized random model (12 layers, 768, vocabulary 50,257; 11 tokens, subject at the
        third, 10 samples) and the three maps of the built-in world's model; with the arithmetic counted, the GFLOP/s
        reached, and those of a plain large matmul
values  z of 32 edits at layer 8 of that model
insert  MEMIT's insertion of 32 edits over its layers 4-8
layers  32 facts edited by ROME and scored at layers 0, 2, .. 10, against edit, score, restore, one by one
moments second moments of its layers 7-11 in one pass, against five passes
alphaedit  AlphaEdit's update (d = 3072, 100 requests, 1,000 earlier ones) against the published LU of the d x d system
history what 2,000 earlier edits add to a batch of 100 by MEMIT and AlphaEdit
solve   d = 3072, 100 keys, the factor kept, against LU in float64
evaluate       50 CounterFact records (the world's where the real ones are absent), no generation
mend           MEND's edits of 32 records, rank 1920, in one pass, against one by one as published
train_editor   iterations of MEND's training with two texts of 100 tokens each, against the published step
train_editor_again  the same where all texts were met before
neurons        knowledge neurons of one fact of that model (8 tokens), 20 points, against the published loop
short_neurons  the same of a prompt of 6 tokens
single_edits   the same under an edit of their own each, in one batch
generate       90 tokens behind each of 64 prompts in one batch, against transformers' own generate
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import closed_form
import editing
import editors
import evaluation
import layers
import moments
import neurons
import torch
from shared import count_cpu_seconds, matmul_gflops, small_gpt2
from tracing import trace_case


def small_gpt2_case(build: Callable[..., dict[str, Any]]) -> Callable[[int, bool], dict[str, Any]]:
    def case(repeat: int, check_only: bool) -> dict[str, Any]:
        model, _ = small_gpt2()
        return {build.__name__.removesuffix("_case"): build(model, 1 if check_only else repeat)}

    return case


CASES: dict[str, Callable[[int, bool], dict[str, Any]]] = {
    "trace": trace_case,
    "values": small_gpt2_case(editing.values_case),
    "insert": small_gpt2_case(editing.insert_case),
    "moments": small_gpt2_case(moments.moments_case),
    "alphaedit": small_gpt2_case(closed_form.alphaedit_case),
    "history": small_gpt2_case(closed_form.history_case),
    "solve": small_gpt2_case(moments.solve_case),
    "layers": small_gpt2_case(layers.layers_case),
    "mend": small_gpt2_case(editors.mend_case),
    "train_editor": small_gpt2_case(editors.train_editor_case),
    "train_editor_again": small_gpt2_case(editors.train_editor_again_case),
    "neurons": small_gpt2_case(neurons.neurons_case),
    "short_neurons": small_gpt2_case(neurons.short_neurons_case),
    "evaluate": small_gpt2_case(evaluation.evaluate_case),
    "single_edits": small_gpt2_case(evaluation.single_edits_case),
    "generate": small_gpt2_case(evaluation.generate_case),
}


def table(cases: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| case | plain loop s | ours s | ratio | arithmetic allows | GFLOP/s | peak MB, plain | ours | error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, r in cases.items():
        if "plain_seconds" not in r:
            continue
        allows, speed = r.get("arithmetic_ratio"), r.get("gflops")
        counted = f"{allows:.1f} | {speed:.0f}" if allows else "|"
        memory = f"{r['plain_peak_mb']:.0f} | {r['peak_mb']:.0f}" if "peak_mb" in r else "|"
        lines.append(
            f"| {name} | {r['plain_seconds']:.3f} | {r['seconds']:.3f} | {r['ratio']:.1f} | {counted} "
            f"| {memory} | {r['error']:.0e} |"
        )
    notes = [f"\n{r['note']}." for r in cases.values() if "note" in r]
    return "\n".join(lines + notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"some of {', '.join(CASES)}")
    parser.add_argument("--check", action="store_true", help="only compare the numbers, once")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of one thread: where the machine is not quiet")
    parser.add_argument("--out", type=Path, help="write JSON here, and the table beside it as .md")
    args = parser.parse_args()
    for case in args.cases:
        if case not in CASES:
            parser.error(f"unknown case '{case}': expected some of {', '.join(CASES)}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    if args.cpu:
        count_cpu_seconds()
    before = matmul_gflops()
    cases = {}
    for case in args.cases:
        cases.update(CASES[case](args.repeat, args.check))
    report = {
        "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "commit": commit,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "matmul_gflops": [before, matmul_gflops()],
        "cases": cases,
    }
    print(table(cases) if not args.check else "all checked")
    print(f"large matmul: {before:.0f} GFLOP/s before, {report['matmul_gflops'][1]:.0f} after")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        head = f"`{report['command']}` at {commit}, {report['machine']}, torch {torch.__version__}\n\n"
        args.out.with_suffix(".md").write_text(head + table(cases) + "\n")


if __name__ == "__main__":
    main()
