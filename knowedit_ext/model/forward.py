"""Hugging Face's own forward pass."""

from __future__ import annotations

from typing import Any

import torch

from .errors import CannotRunError
from .load import EditableModel


def own_forward(model: EditableModel, ids: torch.Tensor, **options: Any) -> Any:
    """What the model gives for token ids [prompts, tokens]; `CannotRunError` where it could never run."""
    try:
        return model.hf(ids.to(model.device), **options)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
        if model.probed:  # it has run before
            raise
        raise CannotRunError(
            f"{type(model.hf).__name__}'s own forward fails ({type(error).__name__}: {error}): load it as it comes, "
            "all of it in one dtype"
        ) from error
