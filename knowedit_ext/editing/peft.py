"""An edit as a LoRA adapter that `peft` loads: a low-rank change is what LoRA stores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..checks import quoted
from ..model.load import public_name
from ..runs.files import write_json, write_tensors
from .changes import Change, LowRank, check_changes, in_float32


def to_peft(changes: Mapping[str, Change], folder: str | Path, base_model: str | None = None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; `PeftModel.from_pretrained(hf, folder)` reads them.

    Changes of different rank share one adapter by `rank_pattern`; alpha equals the rank, so nothing is scaled.
    base_model: the name of what the adapter is for; of a local folder the last component is written.
    Raises ValueError for dense changes, for parameters that are no weights of linear maps, and for numbers that are
    not finite in float32, before anything is written.
    """
    check_changes(changes)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    kinds = set()
    for name, change in changes.items():
        if not isinstance(change, LowRank) or not name.endswith(".weight"):
            raise ValueError(f"the change of {quoted(name)} is not low-rank: LoRA cannot hold it")
        module = name.removesuffix(".weight")
        ranks[module] = change.rank
        inputs, outputs = in_float32(name, change)
        kinds.add(change.input_first)
        # y += B (A x): A reads along the inputs, B writes along the outputs.
        tensors[f"base_model.model.{module}.lora_A.weight"] = inputs.T.contiguous()  # [r, d_in]
        tensors[f"base_model.model.{module}.lora_B.weight"] = outputs.contiguous()  # [d_out, r]
    if not ranks:
        raise ValueError("the edit changes nothing")
    if len(kinds) > 1:
        raise ValueError("the edit mixes Conv1D and Linear weights: one LoRA adapter cannot")
    rank = next(iter(ranks.values()))
    pattern = {module: r for module, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": public_name(base_model) if base_model else None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks),
        "fan_in_fan_out": kinds.pop(),
    }
    folder = Path(folder)
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", config)
