"""Which model moments belong to: checksums of the weights that their keys depend on, and of the tokenizer.

A layer's keys depend on everything below it and on that layer but for its down projection: later layers, the final norm
and the head may differ. A tensor's checksum takes its bits as 64-bit words in rows of 1024 and adds up, modulo 2^64,
the sums of rows and the sums of columns, each times a fixed odd factor: one changed entry always changes it, and it
runs on the tensor's device at the speed of memory. The fingerprint is the SHA-256 of all names, shapes, dtypes and
checksums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..model import EditableModel

_ROW = 1024
_SAMPLE = 1 << 16  # entries of a weight that are compared with one in another dtype
Checksums = dict[str, list[str]]  # name -> [dtype, shape, checksum, checksum of a sample rounded to bfloat16]


def checksum(tensor: torch.Tensor) -> str:
    """128 bits as hex, of the tensor's bits and their order."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.data_ptr() % 8:
        flat = flat.clone()
    octets = flat.view(torch.uint8)
    whole = len(octets) // (8 * _ROW) * (8 * _ROW)
    words = octets[:whole].view(torch.int64).view(-1, _ROW)
    rest = octets[whole:].cpu().numpy().tobytes()
    last = np.frombuffer(rest + bytes(-len(rest) % 8), dtype=np.int64)
    rows = _weighted(words.sum(1).cpu().numpy()) + int.from_bytes(hashlib.sha256(rest).digest()[:8], "little")
    columns = _weighted(words.sum(0).cpu().numpy()) + _weighted(last)
    return f"{rows % 2**64:016x}{columns % 2**64:016x}"


def _weighted(sums: np.ndarray) -> int:
    """Sum of odd factors times `sums`, modulo 2^64."""
    factors = np.arange(1, len(sums) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
    return int((factors * sums.view(np.uint64)).sum(dtype=np.uint64))


def _rounded_sample(tensor: torch.Tensor) -> torch.Tensor:
    """Evenly spaced entries in bfloat16: the same for a float32 weight and for what it was rounded to."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLE)].to(torch.bfloat16)


def weight_checksums(
    model: EditableModel, layers: Sequence[int], originals: Mapping[str, torch.Tensor] | None = None
) -> dict[int, Checksums]:
    """For each of `layers` the checksums of the weights on which its keys depend.

    originals: weights, by parameter name, to take instead of the model's own: those that known edits have replaced.
    """
    found: Checksums = {}
    for name, parameter in model.hf.named_parameters():
        if any(_matters(model, name, layer) for layer in layers):
            parameter = (originals or {}).get(name, parameter)
            if parameter.is_meta:
                raise ValueError(f"weight '{name}' is not in memory: moments need it to know which model they are of")
            kind, shape = str(parameter.dtype).removeprefix("torch."), "x".join(map(str, parameter.shape))
            found[name] = [kind, shape, checksum(parameter), checksum(_rounded_sample(parameter))]
    return {layer: {n: found[n] for n in found if _matters(model, n, layer)} for layer in layers}


def _matters(model: EditableModel, name: str, layer: int) -> bool:
    family = model.modules.family
    layers = f"{family.base}.{family.layers}."
    if name.startswith(layers):
        number, _, part = name[len(layers) :].partition(".")
        return int(number) < layer or (int(number) == layer and not part.startswith(family.down_projection + "."))
    return name.startswith(family.base + ".") and not name.startswith(f"{family.base}.{family.final_norm}.")


def fingerprint(checksums: Checksums) -> str:
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()


def differing_weights(stored: Checksums, found: Checksums) -> list[str]:
    """What differs, in words, one item a weight; empty when both are of one model.

    Weights in another floating dtype are the same when a sample of their entries rounds to the same bfloat16 values: a
    model collected over in float32 may be edited in bfloat16.
    """
    said = [f"no weight '{name}'" for name in sorted(stored.keys() - found.keys())]
    said += [f"an additional weight '{name}'" for name in sorted(found.keys() - stored.keys())]
    for name in sorted(stored.keys() & found.keys()):
        (kind, shape, exact, rounded), (other_kind, other_shape, other_exact, other_rounded) = stored[name], found[name]
        if shape != other_shape:
            said.append(f"'{name}' is {other_shape}, was {shape}")
        elif kind == other_kind and exact != other_exact:
            said.append(f"'{name}' has other values")
        elif kind != other_kind and rounded != other_rounded:
            said.append(f"'{name}' has other values (and is {other_kind}, was {kind})")
    return said


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a fast tokenizer's whole definition but for its padding and truncation settings."""
    spelled = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("padding", "truncation"):
        spelled.pop(setting, None)
    return hashlib.sha256(json.dumps(spelled, sort_keys=True).encode()).hexdigest()
