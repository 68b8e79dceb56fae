"""Which model moments belong to: checksums of the weights that their keys depend on, and of the tokenizer.

A layer's keys depend on everything below it and on that layer but for its down projection: later layers, the final norm
and the head may differ. Each tensor's checksum is a sum modulo 2^64 of its bits times fixed odd factors (one changed
entry always changes it); it runs on the tensor's device at about the speed of memory. The fingerprint is the SHA-256 of
all names, shapes, dtypes and checksums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..model import EditableModel

_CHUNK = 1 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Checksums = dict[str, list[str]]  # name -> [dtype, shape, checksum, checksum of the values rounded to bfloat16]


def checksum(tensor: torch.Tensor) -> str:
    """64 bits as hex, of the tensor's bits in their order."""
    bits = tensor.detach().contiguous().view(-1)
    bits = bits.view(_INTEGERS[bits.element_size()])
    factors = torch.arange(1, min(_CHUNK, len(bits)) + 1, dtype=torch.int64, device=bits.device)
    factors = factors.mul_(-7046029254386353131).bitwise_or_(1)  # odd, spread over 64 bits; products wrap around
    total = 0
    for part in bits.split(_CHUNK):
        here = int((part.to(torch.int64) * factors[: len(part)]).sum())
        total = (total * 6364136223846793005 + here) % 2**64
    return f"{total:016x}"


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
            rounded = parameter.detach().to(torch.bfloat16) if parameter.is_floating_point() else parameter
            shape = "x".join(map(str, parameter.shape))
            found[name] = [str(parameter.dtype).removeprefix("torch."), shape, checksum(parameter), checksum(rounded)]
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

    Weights in another floating dtype are the same when both round to the same bfloat16 values: a model collected over
    in float32 may be edited in bfloat16.
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
