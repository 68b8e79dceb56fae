"""Files that are either whole or not there, and whose bytes depend on their content alone."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file beside `path` to write to, renamed at the end: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Have `write` write a file that replaces `path` as a whole."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        write(file)


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, atomically. Tensors go to the file one by one, not through one large string."""
    with replacing(path) as temporary:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary, dict(metadata))


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise FileNotFoundError(f"'{path}' does not exist") from None
    except SafetensorError as error:
        raise ValueError(f"'{path}' is not a whole safetensors file ({error})") from error


def write_json(path: str | Path, value: Any) -> None:
    """Atomic, sorted keys, one value a line."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def save_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Like `numpy.savez`, but with fixed timestamps: equal arrays give equal bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def load_npz(path: str | Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of a .npz file, never unpickled. ValueError says which file is not whole, or lacks one of `keys`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            absent = [key for key in keys if key not in names]
            if absent:
                raise ValueError(f"it lacks {', '.join(absent)} and holds {', '.join(names) or 'nothing'}")
            found = {}
            for key in keys:
                with archive.open(f"{key}.npy") as member:
                    found[key] = np.lib.format.read_array(member, allow_pickle=False)
            return found
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"'{path}' is not the .npz file expected: {error}") from error
