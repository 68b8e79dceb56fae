"""Files with an inner structure, changed inside that structure: safetensors and npz."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from random import Random
from typing import Any

import numpy as np

from . import mutations


def safetensors(random: Random, given: bytes) -> bytes:
    """The header changed (names, dtypes, shapes, offsets, metadata, its length), or the JSON inside the metadata."""
    length = struct.unpack("<Q", given[:8])[0]
    header, data = json.loads(given[8 : 8 + length]), given[8 + length :]
    change = random.random()
    if change < 0.15:
        claimed = random.choice((0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1))
        return struct.pack("<Q", claimed) + given[8:]
    if change < 0.55:
        header = mutations.json_value(random, header)
    elif change < 0.9 and header.get("__metadata__"):
        name = random.choice(sorted(header["__metadata__"]))
        try:
            inner = mutations.json_value(random, json.loads(header["__metadata__"][name]))
            header["__metadata__"][name] = _spelled(inner)
        except json.JSONDecodeError:
            header["__metadata__"][name] = mutations.text(random, header["__metadata__"][name])
    else:
        names = [name for name in header if name != "__metadata__"]
        name = random.choice(names)
        entry = header[name]
        entry["dtype"] = random.choice(("F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3"))
        size = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(entry["dtype"], 1)
        count = (entry["data_offsets"][1] - entry["data_offsets"][0]) // size
        entry["shape"] = random.choice(([count], [1, count], [count, 1], [0], [2**32, 2**31], [count // 2, 2]))
    spelled = _spelled(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(spelled)) + spelled + data


def _spelled(given: Any) -> str:
    return json.dumps(given)  # NaN and Infinity as Python spells them


def npz(random: Random, arrays: Mapping[str, Any]) -> bytes:
    """A .npz with an array changed, missing or more; an object array; a header that claims more than there is."""
    arrays = dict(arrays)
    name = random.choice(sorted(arrays))
    change = random.random()
    if change < 0.6:
        arrays[name] = mutations.array(random, np.asarray(arrays[name]))
    elif change < 0.75:
        del arrays[name]
    elif change < 0.85:
        arrays[random.choice(("extra", "", "../x"))] = np.zeros(3)
    raw: dict[str, bytes] = {}
    if 0.85 <= change < 0.9:
        arrays[name] = np.array([{"a": 1}, None], dtype=object)
    elif change >= 0.9:
        raw[name] = _claiming(random)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in arrays.items():
            archive.writestr(f"{key}.npy", raw.get(key) or _npy(np.asarray(array)))
    return out.getvalue()


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array)
    return out.getvalue()


def _claiming(random: Random) -> bytes:
    """An .npy whose header tells of terabytes, or is no header."""
    shape = random.choice(("(1099511627776,)", "(1048576, 1048576)", "(-1,)", "('a',)", "(2,"))
    kind = random.choice(("<f8", "<f4", "|O", "<U9", "nonsense"))
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64)
