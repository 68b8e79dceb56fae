"""What all cases share: the median of times, the peak of memory, the models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import knowedit_ext as ke
from knowedit_ext.model.facts import tokenize_fact
from knowedit_ext.world import load_world

clock = time.perf_counter


def count_cpu_seconds() -> None:
    """From now on `timed` gives seconds of one thread's work, which other work on the machine adds little to."""
    global clock
    clock = time.process_time
    torch.set_num_threads(1)


def timed(call: Callable[[], Any], repeat: int) -> tuple[Any, float]:
    """The call's result and the median of its times, in seconds."""
    times = []
    for _ in range(repeat):
        start = clock()
        result = call()
        times.append(clock() - start)
    return result, statistics.median(times)


def peak_memory(call: Callable[[], Any]) -> tuple[Any, float]:
    """The call's result, and the most memory it held at a time, in MB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = _memory("VmRSS")
        return call(), _memory("VmHWM") - before
    except OSError:
        return call(), float("nan")


def _memory(kind: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(kind + ":"))
    return int(line.split()[1]) / 1024


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
