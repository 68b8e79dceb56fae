"""Speed of the package against the published loops, in one process and one run, after a check that both agree.

    python benchmarks/run.py trace [--check] [--repeat 3] [--out benchmarks/results/x.json]

Reports medians.

trace   state map of a GPT-2-small-sized random model (12 layers, 768, vocabulary 50,257; 11 tokens, subject at the
        third, 10 samples) and the three maps of the built-in world's model; with the arithmetic counted, the GFLOP/s
        reached, and those of a plain large matmul
values  z of 32 edits at layer 8 of that model
insert  MEMIT's insertion of 32 edits over its layers 4-8
moments second moments of its layers 7-11 in one pass, against five passes
solve   d = 3072, 100 keys, the factor kept, against LU in float64
evaluate       50 CounterFact records (the world's where the real ones are absent), no generation
single_edits   the same under an edit of their own each, in one batch
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import editing
import evaluation
import moments
import naive
import numpy as np
import torch

import knowedit_ext as ke
from knowedit_ext.model.facts import tokenize_fact
from knowedit_ext.sweep import sweep
from knowedit_ext.tracing.causal import TraceSettings, plan_traces, window_layers
from knowedit_ext.tracing.kinds import window_for
from knowedit_ext.world import load_world


def timed(call: Callable[[], Any], repeat: int) -> tuple[Any, float]:
    """The call's result and the median of its times, in seconds."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, statistics.median(times)


def matmul_gflops(rows: int = 2048, inner: int = 3072, columns: int = 3072) -> float:
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    torch.mm(a, b)
    return 2e-9 * rows * inner * columns / timed(lambda: torch.mm(a, b), 5)[1]


def small_gpt2() -> tuple[ke.EditableModel, ke.Fact]:
    """GPT-2-small-sized, random weights, the world's tokenizer over a vocabulary of 50,257."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).eval()
    model = ke.load_model((hf, AutoTokenizer.from_pretrained(load_world().folder)))
    subject = load_world().facts()[0]["subject"]
    for start in ("In the", "The", "In a", "A", "It is", "This is", "So the"):
        for filler in range(1, 12):
            fact = ke.Fact(start + " {}" + " is" * filler, subject)
            tokenized = tokenize_fact(model, fact)
            if len(tokenized.ids) == 11 and tokenized.subject_range[0] == 2:
                return model, fact
    raise RuntimeError("no prompt of 11 tokens with the subject at the third found")


def world_model() -> tuple[ke.EditableModel, ke.Fact]:
    world = load_world()
    model = ke.load_model(world.folder, dtype="float32")
    record = next(f for f in world.facts() if not f["prompt"].startswith(f["subject"]))
    return model, ke.Fact.from_prompt(record["prompt"], record["subject"])


def compare_trace(model: ke.EditableModel, fact: ke.Fact, kind: str, repeat: int, check_only: bool) -> dict[str, Any]:
    tokenized, noise, layers = tokenize_fact(model, fact), 0.1, range(model.num_layers)
    window = window_for(model.num_layers, None, (kind,))
    if kind == "state":
        row = [[model.modules.layers[layer]] for layer in layers]
    else:
        row = [
            [model.modules.site(kind, w) for w in window_layers(layer, window, model.num_layers)] for layer in layers
        ]
    ids = list(tokenized.ids)
    arguments = (model.hf, model.modules.embedding, [row] * len(ids), ids, tokenized.subject_range, noise)
    plain, plain_time = timed(lambda: naive.causal_trace(*arguments), 1 if check_only else repeat)
    ours, our_time = timed(lambda: ke.trace(model, fact, kind, noise=noise), 1 if check_only else 2 * repeat + 1)
    error = max(np.abs(ours.scores - plain[0]).max(), abs(ours.low_score - plain[1]), abs(ours.high_score - plain[2]))
    if error > 1e-5:
        raise SystemExit(f"{kind}: differs from the plain loop by {error:.1e}: no times are reported")
    plans, interventions = plan_traces(model, [fact], [kind], noise, TraceSettings())
    swept = sweep(model, [plan.clean for plan in plans], interventions)
    weights = sum(p.numel() for p in model.modules.layers[0].parameters() if p.dim() > 1)
    head = model.modules.head.weight.numel()
    flops = swept.flops + 2 * len(swept.states) * head
    # The loop: 1 + 10 rows a cell through all layers, and the head at every position.
    plain_flops = 2 * (len(ids) * len(layers) + 1) * 11 * len(ids) * (weights * len(layers) + head)
    return {
        "tokens": len(ids),
        "subject_range": list(tokenized.subject_range),
        "layers": len(layers),
        "error": float(error),
        "plain_seconds": plain_time,
        "seconds": our_time,
        "ratio": plain_time / our_time,
        "gflop": flops / 1e9,
        "plain_gflop": plain_flops / 1e9,
        "arithmetic_ratio": plain_flops / flops,
        "gflops": flops / 1e9 / our_time,
        "plain_gflops": plain_flops / 1e9 / plain_time,
    }


def trace_case(repeat: int, check_only: bool) -> dict[str, Any]:
    found = {}
    for name, build in (("gpt2_small", small_gpt2), ("world", world_model)):
        model, fact = build()
        for kind in ("state",) if name == "gpt2_small" else ("state", "mlp", "attn"):
            found[f"{name}_{kind}"] = compare_trace(model, fact, kind, repeat, check_only)
            print(f"{name} {kind}: checked, error {found[f'{name}_{kind}']['error']:.1e}", file=sys.stderr)
    return found


def small_gpt2_case(build: Callable[..., dict[str, Any]]) -> Callable[[int, bool], dict[str, Any]]:
    def case(repeat: int, check_only: bool) -> dict[str, Any]:
        model, _ = small_gpt2()
        return {build.__name__.removesuffix("_case"): build(model, timed, 1 if check_only else repeat)}

    return case


CASES: dict[str, Callable[[int, bool], dict[str, Any]]] = {
    "trace": trace_case,
    "values": small_gpt2_case(editing.values_case),
    "insert": small_gpt2_case(editing.insert_case),
    "moments": small_gpt2_case(moments.moments_case),
    "solve": small_gpt2_case(moments.solve_case),
    "evaluate": small_gpt2_case(evaluation.evaluate_case),
    "single_edits": small_gpt2_case(evaluation.single_edits_case),
}


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| case | plain loop s | ours s | ratio | arithmetic allows | GFLOP/s | peak MB, plain | ours | error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, r in found.items():
        allows, speed = r.get("arithmetic_ratio"), r.get("gflops")
        counted = f"{allows:.1f} | {speed:.0f}" if allows else "|"
        memory = f"{r['plain_peak_mb']:.0f} | {r['peak_mb']:.0f}" if "peak_mb" in r else "|"
        lines.append(
            f"| {name} | {r['plain_seconds']:.3f} | {r['seconds']:.3f} | {r['ratio']:.1f} | {counted} "
            f"| {memory} | {r['error']:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"some of {', '.join(CASES)}")
    parser.add_argument("--check", action="store_true", help="only compare the numbers, once")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write JSON here, and the table beside it as .md")
    args = parser.parse_args()
    for case in args.cases:
        if case not in CASES:
            parser.error(f"unknown case '{case}': expected some of {', '.join(CASES)}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    before = matmul_gflops()
    found = {}
    for case in args.cases:
        found.update(CASES[case](args.repeat, args.check))
    report = {
        "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "commit": commit,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "matmul_gflops": [before, matmul_gflops()],
        "cases": found,
    }
    print(table(found) if not args.check else "all checked")
    print(f"large matmul: {before:.0f} GFLOP/s before, {report['matmul_gflops'][1]:.0f} after")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        head = f"`{report['command']}` at {commit}, {report['machine']}, torch {torch.__version__}\n\n"
        args.out.with_suffix(".md").write_text(head + table(found) + "\n")


if __name__ == "__main__":
    main()
