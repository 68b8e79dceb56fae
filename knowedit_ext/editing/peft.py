"""An edit as a LoRA adapter that `peft` loads: a low-rank change is what LoRA stores."""

from __future__ import annotations

from pathlib import Path

import torch

from ..runs.files import write_json, write_tensors
from .edit import Edit, LowRank


def to_peft(edit: Edit, folder: str | Path, base_model: str | None = None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; `PeftModel.from_pretrained(hf, folder)` reads them.

    Edits of different rank share one adapter by `rank_pattern`; alpha equals the rank, so nothing is scaled. Raises
    ValueError for dense changes and for parameters that are no weights of linear maps.
    """
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    kinds = set()
    for name, change in edit.changes.items():
        if not isinstance(change, LowRank) or not name.endswith(".weight"):
            raise ValueError(f"the change of '{name}' is not low-rank: LoRA cannot hold it")
        module = name.removesuffix(".weight")
        ranks[module] = change.inputs.shape[1]
        kinds.add(change.input_first)
        # y += B (A x): A reads along the inputs, B writes along the outputs.
        tensors[f"base_model.model.{module}.lora_A.weight"] = change.inputs.T.float().contiguous()  # [r, d_in]
        tensors[f"base_model.model.{module}.lora_B.weight"] = change.outputs.float().contiguous()  # [d_out, r]
    if not ranks:
        raise ValueError("the edit changes nothing")
    if len(kinds) > 1:
        raise ValueError("the edit mixes Conv1D and Linear weights: one LoRA adapter cannot")
    rank = next(iter(ranks.values()))
    pattern = {module: r for module, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or edit.model.get("name"),
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
