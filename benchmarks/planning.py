"""What a trace of GPT-2 XL's shape does beside its layers: planning, the first and the second time; and how many
operations it hands to the device, each of which is a kernel or more there.

PYTHONPATH=. python benchmarks/planning.py        (a model of 48 layers, 16 wide; seconds of the CPU)
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from gpu_models import prompt_of_12
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import knowedit_ext as ke
from knowedit_ext.sweep import attention, engine
from knowedit_ext.sweep.plan import OnePass, plan_of
from knowedit_ext.tracing.causal import plan_facts, trace_facts
from knowedit_ext.tracing.cells import all_cells
from knowedit_ext.tracing.kinds import KINDS
from knowedit_ext.tracing.settings import TraceSettings
from knowedit_ext.world import load_world


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def no_layers(model: ke.EditableModel, prompts: Any, hidden: torch.Tensor, one: OnePass) -> torch.Tensor:
    return hidden.new_zeros(one.layout.rows[-1], model.hidden_size)


class Operations(TorchDispatchMode):
    """Counts those that compute: no views, nothing that only makes a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("detach", "empty", "_unsafe_view", "_reshape_alias"):
            self.by_name[name] += 1
        return func(*args, **kwargs or {})


def operations(call: Callable[[], Any]) -> Counter[str]:
    with Operations() as counted:
        call()
    return counted.by_name


def main() -> None:
    warnings.filterwarnings("ignore", "corrupting .* does not lower the score")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(bos_token_id=0, eos_token_id=0, n_embd=16, n_layer=48, n_head=2, vocab_size=1100)
    model = ke.load_model((GPT2LMHeadModel(config), AutoTokenizer.from_pretrained(load_world().folder)))
    fact, kinds, settings = prompt_of_12(model), tuple(KINDS), TraceSettings(max_rows=1 << 16)
    (plan,) = plan_facts(model, [fact], kinds, 0.1, settings)
    devices = [torch.device("cpu")] * model.num_layers
    for time_ in ("first", "second"):
        runs = seconds(lambda: all_cells((plan.shape,), kinds))
        rows = seconds(lambda: plan_of(all_cells((plan.shape,), kinds)[0], [plan.shape.tokens], devices, 1 << 16))
        print(f"{time_} time: runs {1e3 * runs:.1f} ms, rows and tables {1e3 * rows:.1f} ms")
    trace_facts(model, [fact], kinds, 0.1, settings)
    with mock.patch.object(engine, "_through_the_layers", no_layers):
        rest = seconds(lambda: trace_facts(model, [fact], kinds, 0.1, settings))
    print(f"three maps planned before, all but the layers: {1e3 * rest:.1f} ms")
    maps = lambda: trace_facts(model, [fact], kinds, 0.1, settings)  # noqa: E731
    with mock.patch.object(attention, "fused_gelu", lambda *modules: nullcontext()):
        before = operations(maps)
    now = operations(maps)
    print(f"operations of the three maps: {now.total()}; with transformers' gelu_new: {before.total()}")
    print("  " + ", ".join(f"{name} {count}" for name, count in now.most_common(12)))


if __name__ == "__main__":
    main()
