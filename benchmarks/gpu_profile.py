"""One profiled trace of GPT-2 XL's size (`gpu.py check`): which kernels the time goes to.

PYTHONPATH=. python benchmarks/gpu_profile.py [--toy]
"""

from __future__ import annotations

import sys
import warnings

import torch
from gpu_measure import Bench
from gpu_models import gpt2_xl, prompt_of_12, random_model
from torch.profiler import ProfilerActivity, profile

import knowedit_ext as ke


def main() -> None:
    warnings.filterwarnings("ignore", "corrupting .* does not lower the score")
    toy = "--toy" in sys.argv
    bench = Bench("cpu" if toy else "cuda", toy)
    model = random_model(bench, gpt2_xl, torch.float32 if toy else torch.bfloat16)
    fact = prompt_of_12(model)
    ke.trace(model, fact, noise=0.1)
    kinds = [ProfilerActivity.CPU] if toy else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=kinds) as profiled:
        ke.trace(model, fact, noise=0.1)
    by = "self_cpu_time_total" if toy else "self_cuda_time_total"
    print(profiled.key_averages().table(sort_by=by, row_limit=30))


if __name__ == "__main__":
    main()
