"""Checksums of tensors and digests of arrays and JSON: whether something is what it was.

A tensor's checksum takes its bits as 64-bit words in rows of 1024, mixes each, and adds up, modulo 2^64, the sums of
rows and the sums of columns, each times a fixed odd factor: one changed entry always changes it, and it runs on the
tensor's device. Without the mixing a float64 matrix and its double would be one: what is added to every exponent is
carried out of the sums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_ROW = 1024
_AT_ONCE = 64  # rows mixed at a time: they stay in the cache
_FACTOR = 0x9E3779B97F4A7C15


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
    row_sums, column_sums = [words.new_zeros(0)], words.new_zeros(_ROW)
    for part in words.split(_AT_ONCE):
        mixed = _mixed(part)
        row_sums.append(mixed.sum(1))
        column_sums += mixed.sum(0)
    by_row = _weighted(torch.cat(row_sums).cpu().numpy())
    by_row += int.from_bytes(hashlib.sha256(rest).digest()[:8], "little")
    by_column = _weighted(column_sums.cpu().numpy()) + _weighted(last)
    return f"{by_row % 2**64:016x}{by_column % 2**64:016x}"


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Another number for every number, its bits all over it (a round of splitmix64)."""
    mixed = words ^ (words >> 30)
    mixed *= _FACTOR - 2**64
    return mixed.bitwise_xor_(mixed >> 27)


def _weighted(sums: np.ndarray) -> int:
    """Sum of odd factors times `sums`, modulo 2^64."""
    factors = np.arange(1, len(sums) + 1, dtype=np.uint64) * np.uint64(_FACTOR) | np.uint64(1)
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
