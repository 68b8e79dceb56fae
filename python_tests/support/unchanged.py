"""Is a model as it was?"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def snapshot(hf: nn.Module) -> dict:
    """Everything about a model that a sweep could leave changed."""
    return {
        "config": copy.deepcopy(hf.config.to_dict()),
        "attention": [m.config._attn_implementation for m in hf.modules() if getattr(m, "config", None) is not None],
        "hooks": [[list(getattr(m, kind)) for kind in HOOKS] for m in hf.modules()],
        "attributes": [sorted(m.__dict__) for m in hf.modules()],
        "training": [m.training for m in hf.modules()],
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in hf.modules()],
        "parameters": {n: (p.detach().clone(), p.requires_grad, p.grad) for n, p in hf.named_parameters()},
        "grad": torch.is_grad_enabled(),
        "random": torch.get_rng_state(),
        "numpy": np.random.get_state()[1],
    }


def assert_unchanged(before: dict, hf: nn.Module) -> None:
    after = snapshot(hf)
    for name in ("config", "attention", "hooks", "attributes", "training", "checkpointing", "grad"):
        assert before[name] == after[name], name
    assert torch.equal(before["random"], after["random"]) and np.array_equal(before["numpy"], after["numpy"])
    for name, (value, requires_grad, grad) in before["parameters"].items():
        now = after["parameters"][name]
        assert torch.equal(value, now[0]) and requires_grad == now[1] and grad is now[2], name
