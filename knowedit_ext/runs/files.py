"""Files that are either whole or not there, whose bytes depend on their content alone, and that tell when they were
altered. What is read may be damaged or foreign: that is a ValueError which names the file, at a bounded cost."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from reprlib import repr as brief
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .checksums import arrays_digest, checksum, json_digest
from .interrupts import whole_contexts

SEAL = "knowedit_digest"  # in our files: the digest of everything else
_LONGEST = 150  # bytes of a name's part: file systems take 255 for the whole
_AGAIN = "delete it to have it computed again, or take it from where it was whole"
_INFLATED, _SMALL = 100, 1 << 26  # a compressed array may not be larger than both, times its size in the file and bytes


def file_name(part: object, what: str) -> str:
    """`part` as part of a file's name; ValueError where it could lead elsewhere or be no name.

    Every id or name that comes from data goes through here before it names a file.
    """
    text = str(part)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        size = 0
    shown = repr(text if len(text) <= 60 else text[:57] + "...")
    if not 0 < size <= _LONGEST or text in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", text):
        raise ValueError(
            f"{what} {shown} cannot name a file: expected up to {_LONGEST} bytes of text without '/', '\\' and "
            "control characters"
        )
    return text


def model_file_name(name: str) -> str:
    """A model's name as published in names of files: "/" as "_"."""
    return file_name(re.sub(r"[/\\]", "_", name), "the model's name")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file to write to, renamed to `path` at the end: a reader sees the old file or the whole new one.

    It lies in a hidden folder of its own beside `path`, with whatever else its writer needs on the way. That folder is
    removed at the end; one that a killed process left is, when `path` is written again.
    """
    path = Path(path)
    if not path.name:
        raise ValueError(f"'{path}' is no name of a file")
    place = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_contexts(), _place_beside(path) as place:
            temporary = place / path.name
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
    except OSError as error:
        ours = place is None or error.filename in (None, str(place), str(place / path.name))
        if ours and error.errno is not None:
            words = f"{os.strerror(error.errno)}, so this was left as it was"
            raise OSError(error.errno, words, str(path)) from error
        raise


@contextmanager
def _place_beside(path: Path) -> Iterator[Path]:
    place, lock = _take_place(path)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def _take_place(path: Path) -> tuple[Path, int]:
    """An empty folder beside `path` and its lock: the first that no living process is writing in."""
    for number in count():
        place, made = path.parent / f".{path.name}.{number}.tmp", False
        with suppress(FileExistsError):
            place.mkdir()
            made = True
        try:
            lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            continue
        with suppress(FileNotFoundError):  # who had it may have removed it meanwhile
            if _lock(lock, made) and os.path.samestat(os.stat(place), os.fstat(lock)):
                for left in place.iterdir():
                    left.unlink()
                return place, lock
        os.close(lock)


def _lock(handle: int, made: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: what was just made is nobody else's
        return made
    return True


def remove_unfinished(*folders: Path) -> None:
    """Remove what killed runs were writing there. Only for who holds the folder alone, see `runs.lock`."""
    for folder in folders:
        for left in folder.glob(".*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def atomic_write(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Have `write` write a file that replaces `path` as a whole."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        write(file)


def _opened(path: str | Path) -> BinaryIO:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{brief(path)} is no path of a file: expected text or a Path")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist")
    if not path.is_file():
        raise ValueError(f"'{path}' is no file")
    return path.open("rb")


# -- JSON -------------------------------------------------------------------------------------------------------------


def write_json(path: str | Path, value: Any, sealed: bool = False) -> None:
    """Atomic, sorted keys, one value a line. sealed: an object gets a digest, which `load_json` looks at."""
    content = json_bytes(seal(value) if sealed else value)
    atomic_write(path, lambda file: file.write(content))


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of the rest."""
    return {**value, SEAL: json_digest(value)}


def json_bytes(value: Any) -> bytes:
    """As `write_json` spells it."""
    spelled = dict(indent=1, sort_keys=True, allow_nan=False)
    try:
        return (json.dumps(value, ensure_ascii=False, **spelled) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8
        return (json.dumps(value, **spelled) + "\n").encode()


def load_json(path: str | Path, kind: type = dict, sealed: bool = False) -> Any:
    """What a JSON file holds, which has to be of this kind; its seal is checked, where it has one, and left out.

    sealed: it has to have one: it is a file of ours.
    """
    with _opened(path) as file:
        content = file.read()
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not JSON ({error}): {_AGAIN}") from error
    if not isinstance(value, kind):
        raise ValueError(f"'{path}' holds a {type(value).__name__}: expected a {kind.__name__}")
    if isinstance(value, dict) and (sealed or SEAL in value):
        seal = value.pop(SEAL, None)
        if seal != json_digest(value):
            raise _altered(path)
    return value


def _altered(path: str | Path) -> ValueError:
    return ValueError(f"'{path}' was altered after it was written: {_AGAIN}")


# -- arrays -----------------------------------------------------------------------------------------------------------


def save_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Like `numpy.savez`, but with fixed timestamps: equal arrays give equal bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def write_npz(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz, atomically, with a digest that `load_npz` looks at."""
    sealed = {SEAL: np.array(arrays_digest(arrays)), **arrays}  # first: what a damaged directory loses is missed
    atomic_write(path, lambda file: save_npz(file, sealed))


def load_npz(
    path: str | Path, keys: Collection[str] | None = None, optional: Collection[str] = (), sealed: bool = False
) -> dict[str, np.ndarray]:
    """Arrays of a .npz file, all or those named (`optional`: where they are there), never unpickled; each takes no more
    memory than the file makes likely.

    ValueError says which file is not whole, was altered, or lacks one of `keys`. The seal is left out; sealed: it has
    to be there, the file is one of ours.
    """
    with _opened(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                absent = [key for key in keys or () if key not in names]
                if absent:
                    raise ValueError(f"it lacks {', '.join(absent)} and holds {', '.join(names) or 'nothing'}")
                has_seal = SEAL in names
                asked = names if keys is None else [*keys, *(key for key in optional if key in names)]
                wanted = names if has_seal else asked
                arrays = {key: _member(archive, key) for key in wanted}
        except Exception as error:  # damaged bytes raise whatever they meet: zip, zlib, struct, numpy, memory, ...
            raise ValueError(f"'{path}' is not the .npz file expected: {error}; {_AGAIN}") from error
    if (sealed or has_seal) and str(arrays.pop(SEAL, "")) != arrays_digest(arrays):
        raise _altered(path)
    return {key: arrays[key] for key in asked if key != SEAL}


def _member(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    try:
        entry = archive.getinfo(f"{key}.npy")
    except KeyError:
        entry = archive.getinfo(key)
    if entry.file_size > max(_SMALL, _INFLATED * entry.compress_size):
        raise ValueError(f"{key} claims {entry.file_size} bytes out of {entry.compress_size}")
    with archive.open(entry) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read(member)
        if dtype.hasobject:
            raise ValueError(f"{key}: Object arrays cannot be loaded when allow_pickle=False")
        content = member.read()  # to the end, where the zip file's own checksum is looked at
    count = int(np.prod(shape, dtype=object))
    if not dtype.itemsize or count * dtype.itemsize != len(content):
        raise ValueError(f"{key} has {len(content)} bytes: expected {dtype} {list(shape)}")
    return np.frombuffer(bytearray(content), dtype=dtype).reshape(shape, order="F" if by_column else "C")


# -- tensors ----------------------------------------------------------------------------------------------------------


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, atomically, with checksums that `read_tensors` looks at; equal content gives equal bytes."""
    with replacing(path) as temporary:
        save_tensors(temporary, tensors, metadata)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """What `write_tensors` writes, into an open place. Tensors go to the file one by one, not as one large string."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    storages = [x.untyped_storage().data_ptr() for x in tensors.values()]
    if len(set(storages)) < len(storages):  # the library takes none that share memory
        tensors = {name: x.clone() for name, x in tensors.items()}
    try:
        save_file(tensors, path, {**metadata, SEAL: json.dumps(_seal(tensors, metadata), sort_keys=True)})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise ValueError(f"'{path}' could not be written: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    _sort_header(path)


def _seal(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Of the metadata, and of every tensor: what its bits are, and what they are read as."""
    seals = {name: f"{x.dtype} {list(x.shape)} {checksum(x)}" for name, x in tensors.items()}
    return {"": json_digest(dict(metadata))} | seals


def _is_seal(stored: str, value: str) -> bool:
    """A seal of earlier versions is the checksum alone."""
    return stored in (value, value.rpartition(" ")[2])


def _sort_header(path: Path) -> None:
    """Metadata in the order of their keys: the library writes them in a new order every time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"the header of '{path}' grew from {size} to {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(size))


def read_tensors(
    path: str | Path, wanted: Collection[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of a safetensors file, all or those named that are there, on the CPU, and its metadata.

    ValueError says which file is not whole or was altered.
    """
    _opened(path).close()
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names if wanted is None or name in wanted}
            metadata = dict(sorted((file.metadata() or {}).items()))
        seals = json.loads(metadata.pop(SEAL, "null"))
        whole = seals is None or (
            seals.keys() == {"", *names}
            and all(_is_seal(seals[name], value) for name, value in _seal(tensors, metadata).items())
        )
    except Exception as error:  # damaged bytes raise whatever they meet
        raise ValueError(f"'{path}' is not a whole safetensors file ({error}): {_AGAIN}") from error
    if not whole:
        raise _altered(path)
    return tensors, metadata
