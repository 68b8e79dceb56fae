"""Which model results, moments and edits belong to: what it is, checksums of its weights and of its tokenizer, and what
its config says of how it computes with them.

A fingerprint is the SHA-256 of all names, shapes, dtypes and checksums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..runs.checksums import checksum as checksum
from ..runs.settings import differing, marked
from .load import EditableModel
from .weights import stored_weights

# Of a config what has no part in a model's numbers, or is told elsewhere.
_NO_PART = frozenset(
    """_name_or_path architectures auto_map transformers_version dtype torch_dtype quantization_config use_cache
    return_dict output_attentions output_hidden_states id2label label2id problem_type initializer_range
    bos_token_id eos_token_id pad_token_id""".split()
)
_SAMPLE = 1 << 16  # entries of a weight that are compared with one in another dtype
_ROUNDED = (torch.bfloat16, torch.float16)
# name -> [dtype, shape, checksum, checksums of a sample rounded to each of _ROUNDED (files of before lack the last)]
Checksums = dict[str, list[str]]


def describe(model: EditableModel) -> dict[str, Any]:
    """What the model is, whatever its weights hold."""
    return {
        "name": model.name,
        "type": model.modules.model_type,
        "layers": model.num_layers,
        "hidden": model.hidden_size,
    }


def identity(model: EditableModel) -> dict[str, Any]:
    """What tells a model, as it is now, from others: weights with the edits in force, numbers, tokenizer.

    It takes the time of reading the weights once. Nothing is kept: they may change. `name` is told, but is no part of
    what makes two models different.
    """
    return {
        **describe(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "precision": model.precision,
        "bos": model.bos,
        "tokenizer": marked(tokenizer_hash(model.tokenizer)),
        "weights": marked(fingerprint(weight_checksums(model, lambda name: True))),
        "config": config(model),
        "beside": beside(model),
    }


def config(model: EditableModel) -> dict[str, Any]:
    """What the model's config says of how it computes (JSON): heads, rotary base, windows, epsilons, caps and the like.

    The same weights give other numbers under another config.
    """
    said = {key: value for key, value in model.modules.config.to_dict().items() if key not in _NO_PART}
    return json.loads(json.dumps(said, sort_keys=True, default=str))


def differing_config(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs, in words, of what both say: another transformers may know more keys or fewer."""
    return differing(*({key: each[key] for key in stored if key in current} for each in (stored, current)), "config")


def beside(model: EditableModel) -> list[str]:
    """Of edits in force what stands beside a weight that cannot be written, and is not seen in it."""
    changes = [
        (name, change)
        for applied in model.applied_edits
        for name, change in sorted(applied.edit.changes.items())
        if name not in applied.placed.before
    ]
    return [marked(name, checksum(change.inputs), checksum(change.outputs)) for name, change in changes]


def weight_checksum(weight: torch.Tensor) -> list[str]:
    """[dtype, shape, checksum, checksums of evenly spaced entries in bfloat16 and in float16].

    The last ones are the same for a float32 weight and for what it was rounded to.
    """
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, len(flat) // _SAMPLE)]
    kind, shape = str(weight.dtype).removeprefix("torch."), "x".join(map(str, weight.shape))
    return [kind, shape, checksum(weight), *(checksum(sample.to(dtype)) for dtype in _ROUNDED)]


def weight_checksums(
    model: EditableModel, wanted: Callable[[str], bool], originals: Mapping[str, torch.Tensor] | None = None
) -> Checksums:
    """Checksums of the weights whose real name is `wanted`.

    originals: weights, by name, to take instead of the model's own: those that known edits have replaced. What
    accelerate has offloaded is read from where it keeps it; ValueError for a weight that is nowhere.
    """
    checksums: Checksums = {}
    tied = getattr(model.hf, "all_tied_weights_keys", None) or {}
    for name, stored in stored_weights(model):
        if wanted(name) and not (stored.is_meta and name in tied):  # what is offloaded is no longer one tensor
            weight = (originals or {}).get(name, stored)
            checksums[name] = weight_checksum(_offloaded(model.hf, name) if weight.is_meta else weight)
    return checksums


def _offloaded(hf: nn.Module, name: str) -> torch.Tensor:
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):  # the hook is on the module that has the weight, or on one around it
        hook = getattr(hf.get_submodule(".".join(parts[:end])), "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            kept = getattr(each, "weights_map", None)
            if kept is not None and ".".join(parts[end:]) in kept:
                return kept[".".join(parts[end:])]
    raise ValueError(
        f"weight '{name}' is not in memory, nor where accelerate keeps what it offloads: it takes part in telling which"
        " model this is"
    )


def fingerprint(checksums: Checksums) -> str:
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()


def differing_weights(stored: Checksums, current: Checksums) -> list[str]:
    """What differs, in words, one item a weight; empty when both are of one model.

    Weights in another floating dtype are the same when a sample of their entries rounds to the same values in the
    coarser of the two: what was made from a float32 model may serve its bfloat16 or float16 copy (those two pass for
    each other only where one was made from the other).
    """
    differences = [f"no weight '{name}'" for name in sorted(stored.keys() - current.keys())]
    differences += [f"an additional weight '{name}'" for name in sorted(current.keys() - stored.keys())]
    for name in sorted(stored.keys() & current.keys()):
        (kind, shape, exact, *_), (other_kind, other_shape, other_exact, *_) = stored[name], current[name]
        if shape != other_shape:
            differences.append(f"'{name}' is {other_shape}, was {shape}")
        elif kind == other_kind and exact != other_exact:
            differences.append(f"'{name}' has other values")
        elif kind != other_kind and not _same_rounded(stored[name], current[name]):
            differences.append(f"'{name}' has other values (and is {other_kind}, was {kind})")
    return differences


def _same_rounded(stored: list[str], current: list[str]) -> bool:
    """Whether samples agree in the coarser dtype (float16 values do not round to bfloat16 as their origin does)."""
    kinds = (stored[0], current[0])
    at = 4 if "float16" in kinds and "bfloat16" not in kinds and min(len(stored), len(current)) > 4 else 3
    return stored[at] == current[at]


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a fast tokenizer's whole definition but for its padding and truncation settings."""
    spelled = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("padding", "truncation"):
        spelled.pop(setting, None)
    return hashlib.sha256(json.dumps(spelled, sort_keys=True).encode()).hexdigest()
