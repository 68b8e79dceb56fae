"""EasyEdit alone and EasyEdit on us, in one process and one run, after a check that both give the same.

    python benchmarks/dropin.py --easyedit CLONE [--requests 32] [--rome-alone 4] [--memit-alone 32] [--out FILE.json]

Its own `BaseEditor`, with its metrics, over requests of the built-in world, on a GPT-2-small-sized random model (12
layers, 768, vocabulary 50,257): `edit` with ROME (21 contexts, as its hparams/ROME) and `batch_edit` with MEMIT (6
contexts, layers 4-8). Contexts and second moments are given to both: alone it would make its contexts of garbage (see
docs/dropin.md). Alone it takes minutes for a request; --rome-alone and --memit-alone say how many of the requests it
edits, and its time for all is that times the ratio (its loop takes requests one by one). Ours is the median of
--repeat runs over all requests; peak memory is beside it. What EasyEdit imports for its multimodal parts and is not
installed is replaced by empty modules.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import importlib
import importlib.abc
import io
import json
import logging
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import matmul_gflops, peak_memory, timed
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from knowedit_ext.compat import easyedit
from knowedit_ext.world import load_world

MODEL, WIDTH, SAMPLES = "gpt2-small", 3072, 100000
STARTS = ["The weather was mild", "They went home", "I read it", "So it is", "You know that"]
ROME_CONTEXTS = ["{}", *(f"{a}{b}. {{}}" for a in STARTS for b in ("", " now", " and they knew", " as we say"))]
MEMIT_CONTEXTS = [["{}"], [f"{start}. {{}}" for start in STARTS]]
MODULES = {
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "transformer.wte",
}
SHARED = MODULES | {
    "fact_token": "subject_last",
    "v_num_grad_steps": 20,
    "v_lr": 0.5,
    "v_loss_layer": 11,
    "v_weight_decay": 0.5,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": SAMPLES,
    "mom2_dtype": "float32",
    "model_name": f"./{MODEL}",
    "stats_dir": "./stats",
    "device": "cpu",
}
ROME = SHARED | {
    "alg_name": "ROME",
    "layers": [5],
    "clamp_norm_factor": 4,
    "context_template_length_params": [[5, 10], [10, 10]],
}
MEMIT = SHARED | {
    "alg_name": "MEMIT",
    "layers": [4, 5, 6, 7, 8],
    "layer_selection": "all",
    "clamp_norm_factor": 0.75,
    "mom2_update_weight": 15000.0,
}


class Absent(importlib.abc.MetaPathFinder):
    """Empty modules for packages that are not installed."""

    PACKAGES = frozenset(
        """iopath torchvision timm fairscale cv2 av qwen_vl_utils sentence_transformers einops datasets hydra zhipuai
        rouge openai pandas higher omegaconf""".split()
    )

    class Module(types.ModuleType):
        __path__: list[str] = []

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            members = {"__init__": lambda self, *a, **k: None, "__class_getitem__": classmethod(lambda c, k: c)}
            return type(name, (), members)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.PACKAGES else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return self.Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def prepare(folder: Path) -> None:
    """The model with its tokenizer, and second moments of its layers where EasyEdit looks for them."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).save_pretrained(folder / MODEL)
    AutoTokenizer.from_pretrained(load_world().folder).save_pretrained(folder / MODEL)
    stats = folder / "stats" / MODEL / "wikipedia_stats"
    stats.mkdir(parents=True)
    for layer in MEMIT["layers"]:
        keys = torch.randn(2 * WIDTH, WIDTH)
        file = stats / f"transformer.h.{layer}.mlp.c_proj_float32_mom2_{SAMPLES}.npz"
        names = {"mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": len(keys)}
        np.savez(file, **names, **{"mom2.mom2": (keys.T @ keys).numpy(), "sample_size": SAMPLES})


def arguments_of(count: int) -> dict[str, Any]:
    """What `edit` and `batch_edit` take: requests with a rephrased prompt, three neighbours, a portability prompt."""
    chosen = [r for r in load_world().records() if r["paraphrase_prompts"] and len(r["neighborhood_prompts"]) >= 3]
    records = random.Random(0).sample(chosen, count)
    asked = [r["requested_rewrite"] for r in records]
    new, true = ([a[key]["str"] for a in asked] for key in ("target_new", "target_true"))
    near = [r["neighborhood_prompts"][:3] for r in records]
    return {
        "prompts": [a["prompt"].replace("{}", a["subject"]) for a in asked],
        "subject": [a["subject"] for a in asked],
        "target_new": new,
        "ground_truth": true,
        "rephrase_prompts": [r["paraphrase_prompts"][0] for r in records],
        "locality_inputs": {"neighborhood": {"prompt": near, "ground_truth": [[t] * 3 for t in true]}},
        "portability_inputs": {
            "other": {"prompt": [r["paraphrase_prompts"][-1] for r in records], "ground_truth": new}
        },
        "verbose": False,
    }


def first(arguments: dict[str, Any], count: int) -> dict[str, Any]:
    """The same call for the first requests alone."""
    cut = lambda x: {k: cut(v) for k, v in x.items()} if isinstance(x, dict) else x[:count]  # noqa: E731
    return {name: cut(value) if isinstance(value, (list, dict)) else value for name, value in arguments.items()}


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def editor(name: str, hparams: dict[str, Any]) -> Any:
    library = importlib.import_module("easyeditor")
    with silent():
        return library.BaseEditor.from_hparams(getattr(library, f"{name}HyperParams")(**copy.deepcopy(hparams)))


def case(name: str, method: str, hparams: dict[str, Any], count: int, alone: int, repeat: int) -> dict[str, Any]:
    arguments = arguments_of(count)

    def run(requests: dict[str, Any]) -> Callable[[], Any]:
        def go() -> Any:
            random.seed(0)
            with silent():
                return getattr(edited, method)(**copy.deepcopy(requests))[0]

        return go

    edited = editor(name, hparams | ({"batch_size": count} if name == "MEMIT" else {}))
    used = sum(easyedit.calls().values())
    alone_seconds, alone_cpu, alone_memory, theirs = measured(run(first(arguments, alone)), 1)
    if sum(easyedit.calls().values()) != used:
        raise SystemExit(f"{name}: ours ran where EasyEdit should be alone")
    with easyedit.installed():
        same = run(first(arguments, alone))()  # as EasyEdit alone was asked
        seconds, cpu, memory, _ = measured(run(arguments), repeat)
    if sum(easyedit.calls().values()) == used:
        raise SystemExit(f"{name}: none of ours ran")
    differ = differing(same, theirs)
    if differ:
        raise SystemExit(f"{name}: {len(differ)} metrics differ, {differ[:3]}: no times are reported")
    whole = count / alone
    return {
        "requests": count,
        "alone_requests": alone,
        "alone_measured_seconds": alone_seconds,
        "alone_seconds": alone_seconds * whole,
        "seconds": seconds,
        "ratio": alone_seconds * whole / seconds,
        "alone_cpu_seconds": alone_cpu * whole,
        "cpu_seconds": cpu,
        "cpu_ratio": alone_cpu * whole / cpu,
        "alone_peak_mb": alone_memory,
        "peak_mb": memory,
    }


def measured(call: Callable[[], Any], repeat: int) -> tuple[float, float, float, Any]:
    """Median seconds, mean seconds of processor time (which other processes do not lengthen), peak MB, the result."""
    gc.collect()
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is kept for later would hide what is used
    before = time.process_time()
    (result, seconds), memory = peak_memory(lambda: timed(call, repeat))
    return seconds, (time.process_time() - before) / repeat, memory, result


def differing(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Where the metrics differ, times aside."""
    if isinstance(theirs, dict):
        return [d for key in theirs if key != "time" for d in differing(ours.get(key), theirs[key], f"{path}.{key}")]
    if isinstance(theirs, (list, tuple)):
        if len(ours) != len(theirs):
            return [path]
        return [d for n, pair in enumerate(zip(ours, theirs, strict=True)) for d in differing(*pair, f"{path}[{n}]")]
    return [] if ours == theirs else [f"{path}: {ours} and {theirs}"]


def table(cases: dict[str, Any]) -> str:
    lines = [
        "| | EasyEdit alone s | on us s | ratio | ratio of processor time | peak MB, alone | on us |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, c in cases.items():
        alone = f"{c['alone_seconds']:.0f}"
        if c["alone_requests"] != c["requests"]:
            alone += f" ({c['alone_measured_seconds']:.0f} for {c['alone_requests']})"
        ratios = f"{c['ratio']:.1f} | {c['cpu_ratio']:.1f}"
        memory = f"{c['alone_peak_mb']:.0f} | {c['peak_mb']:.0f}"
        lines.append(f"| {name}, {c['requests']} requests | {alone} | {c['seconds']:.1f} | {ratios} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--easyedit", type=Path, required=True, help="folder of a clone of zjunlp/EasyEdit")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rome-alone", type=int, default=4)
    parser.add_argument("--memit-alone", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=["ROME", "MEMIT"])
    parser.add_argument("--out", type=Path, help="write JSON here, and the table beside it as .md")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    out, clone = args.out and args.out.resolve(), args.easyedit.resolve()
    sys.path.insert(0, str(clone))
    sys.meta_path.append(Absent())
    before = matmul_gflops()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # EasyEdit writes ./logs
        prepare(Path(folder))
        with easyedit.installed():  # supplies the module that transformers has dropped
            pass
        logging.disable(logging.INFO)
        models = "easyeditor.models"
        importlib.import_module(f"{models}.rome.rome_main").CONTEXT_TEMPLATES_CACHE = ROME_CONTEXTS
        importlib.import_module(f"{models}.memit.memit_main").CONTEXT_TEMPLATES_CACHE = MEMIT_CONTEXTS
        cases = {}
        if args.only != "MEMIT":
            cases["edit, ROME"] = case("ROME", "edit", ROME, args.requests, args.rome_alone, args.repeat)
            print(table(cases), flush=True)
        if args.only != "ROME":
            cases["batch_edit, MEMIT"] = case(
                "MEMIT", "batch_edit", MEMIT, args.requests, args.memit_alone, args.repeat
            )
        os.chdir(clone)
    revision = subprocess.run(["git", "-C", str(clone), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    report = {
        "command": " ".join(["python", "benchmarks/dropin.py", *sys.argv[1:]]).replace(str(args.easyedit), "EasyEdit"),
        "commit": commit,
        "easyedit": revision.stdout.strip() or "unknown",
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "matmul_gflops": [before, matmul_gflops()],
        "cases": cases,
    }
    print(table(cases))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        command = report["command"] = report["command"].replace(str(out.parent), "benchmarks/results/cpu")
        out.write_text(json.dumps(report, indent=1) + "\n")
        head = f"`{command}` at {commit}, {report['machine']}, torch {torch.__version__}\n\n"
        out.with_suffix(".md").write_text(head + table(cases) + "\n")


if __name__ == "__main__":
    main()
