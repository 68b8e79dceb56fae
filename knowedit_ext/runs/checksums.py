"""Checksums of tensors and digests of arrays and JSON: whether something is what it was.

A tensor's checksum takes its bits as 64-bit words in rows of 1024 and adds up, modulo 2^64, the sums of rows and the
sums of columns, each times a fixed odd factor: one changed entry always changes it, and it runs on the tensor's device
at the speed of memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_ROW = 1024


def checksum(tensor: torch.Tensor) -> str:
    """128 bits as hex, of the tensor's bits and their order."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.data_ptr() % 8:
        flat = flat.clone()
    octets = flat.view(torch.uint8)
    rows = len(octets) // (8 * _ROW)
    whole = rows * 8 * _ROW
    words = octets[:whole].view(torch.int64).view(rows, _ROW)
    rest = octets[whole:].cpu().numpy().tobytes()
    last = np.frombuffer(rest + bytes(-len(rest) % 8), dtype=np.int64)
    by_row = _weighted(words.sum(1).cpu().numpy()) + int.from_bytes(hashlib.sha256(rest).digest()[:8], "little")
    by_column = _weighted(words.sum(0).cpu().numpy()) + _weighted(last)
    return f"{by_row % 2**64:016x}{by_column % 2**64:016x}"


def _weighted(sums: np.ndarray) -> int:
    """Sum of odd factors times `sums`, modulo 2^64."""
    factors = np.arange(1, len(sums) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
    return int((factors * sums.view(np.uint64)).sum(dtype=np.uint64))


def digest(*contents: bytes) -> str:
    """128 bits as hex, of some bytes and where each ends."""
    made = hashlib.blake2b(digest_size=16)
    for content in contents:
        made.update(len(content).to_bytes(8, "little") + content)
    return made.hexdigest()


def json_digest(value: Any) -> str:
    """Of a JSON value; the same for what it is written to a file and read back as."""
    plain = json.loads(json.dumps(value))  # keys that are numbers become text before they are sorted
    return digest(json.dumps(plain, sort_keys=True).encode())


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Of arrays by name: names, dtypes, shapes and values."""
    parts: list[bytes] = []
    for name, array in sorted(arrays.items()):
        array = np.asanyarray(array)
        parts += [f"{name} {array.dtype.str} {array.shape}".encode(), array.tobytes()]
    return digest(*parts)
