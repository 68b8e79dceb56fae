"""The state of an unfinished training run, in one safetensors file: weights, moments of the optimiser, step."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..runs.files import replacing

STATE_FILE = "training.safetensors"


def save_state(out: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, settings: dict) -> None:
    """Write the state after ``step`` steps; a kill leaves the former file or the new one, never a part."""
    tensors = {f"model.{name}": value.contiguous() for name, value in model.named_parameters()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": value.contiguous() for name, value in moments.items()})
    with replacing(out / STATE_FILE) as scratch:
        save_file(tensors, scratch, metadata={"step": str(step), "settings": json.dumps(settings)})


def load_state(out: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: dict) -> int:
    """Take up the state in ``out``, if there is one, and return the number of steps done.

    Raises:
        ValueError: the state belongs to a run with other settings.
    """
    file = out / STATE_FILE
    if not file.is_file():
        return 0
    with safe_open(file, "pt") as stored:
        meta = stored.metadata()
        if json.loads(meta["settings"]) != settings:
            raise ValueError(f"{file} belongs to a run with other settings: {meta['settings']}; remove it or use them")
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(tensors[f"model.{name}"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(meta["step"])


def remove_state(out: Path) -> None:
    """A finished run has nothing to resume."""
    (out / STATE_FILE).unlink(missing_ok=True)
