"""A model as it is now, edits and all, as a folder that Hugging Face's `from_pretrained` loads."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ..checks import typed
from ..model.load import EditableModel


@typed
def save_edited(model: EditableModel, folder: str | Path) -> None:
    """Weights (safetensors), config and tokenizer. The folder is there when it is whole, under its name.

    ValueError for a folder that holds something, and for quantised weights, whose edits are a side path.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"'{folder}' is not empty")
    if getattr(model.hf, "quantization_config", None) or getattr(model.hf.config, "quantization_config", None):
        raise ValueError("a quantised weight keeps its bits, and its edit is a side path: load the model unquantised")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as beside:
        whole = Path(beside) / folder.name
        model.hf.save_pretrained(whole)
        model.tokenizer.save_pretrained(whole)
        if folder.exists():
            folder.rmdir()
        shutil.move(whole, folder)
