"""The published files, fetched once into a cache folder and verified before they are used."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from importlib import import_module
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

ORIGIN = "https://rome.baulab.info/data/dsets/"
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """Where a file is, and what it must be: of this size (bytes) and checksum, or, where none has been published, what
    `load` (a module of `datasets` and its loader) reads without an error."""

    url: str
    size: int | None = None
    sha256: str | None = None
    load: tuple[str, str] | None = None

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


FILES = {
    "known_1000": RemoteFile(ORIGIN + "known_1000.json", load=("known", "load_known")),
    "zsre": RemoteFile(ORIGIN + "zsre_mend_eval.json", load=("zsre", "load_zsre")),
    "counterfact": RemoteFile(
        ORIGIN + "counterfact.json",
        45_108_470,
        "d017056125178a13728594e66a801357a8db9ed7973a7425554bb4271de9fc6f",
    ),
    "attribute_snippets": RemoteFile(
        ORIGIN + "attribute_snippets.json",
        926_285_719,
        "10b5c1cd105e54d5983c72de1b45bfc88bc7af786f7b99def2557886ff23385b",
    ),
    "idf": RemoteFile(
        ORIGIN + "idf.npy",
        11_042_168,
        "c073d642589d4ac6432f467230329b36364a01e72de63a77a3624b745b923dda",
    ),
    "tfidf_vocab": RemoteFile(
        ORIGIN + "tfidf_vocab.json",
        31_639_072,
        "8a78c4f20d8d85dadfd14e283d71af255482ff18aa0eb8a81716024c05ff888b",
    ),
}


def cache_folder() -> Path:
    """$KNOWEDIT_CACHE, or `knowedit` in the platform's folder for caches."""
    if chosen := os.environ.get("KNOWEDIT_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "knowedit"


def download(name: str, folder: str | Path | None = None, *, progress: bool = True) -> Path:
    """The path of a published file, which is fetched from rome.baulab.info where `folder` does not hold it yet.

    name: known_1000, zsre, counterfact, attribute_snippets, idf or tfidf_vocab.
    folder: default `cache_folder()`.

    A download that broke off goes on where it stopped when called again. Size and sha256 are verified before the file
    gets its name (known_1000 and zsre, for which none are published: that their loaders read them); one that arrived
    corrupted is deleted. Several processes may ask for the same file.

    Raises ValueError for an unknown name or a file that is not the published one; ConnectionError where the site cannot
    be reached, with what to put where by hand.
    """
    if name not in FILES:
        raise ValueError(f"unknown file '{name}': expected one of {', '.join(FILES)}")
    remote = FILES[name]
    path = Path(folder or cache_folder()) / remote.file_name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _fetch_whole(remote, path, progress)
    if wrong := _difference(path, remote):
        raise ValueError(f"'{path}' is not the published file: {wrong}. Remove it to download it again")
    return path


def _fetch_whole(remote: RemoteFile, path: Path, progress: bool) -> None:
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    if remote.size is None or have != remote.size:
        _fetch(remote, part, path, progress)
    if wrong := _difference(part, remote):
        part.unlink()
        raise ValueError(f"'{remote.url}' arrived corrupted and was deleted: {wrong}")
    os.replace(part, path)


def _difference(path: Path, remote: RemoteFile) -> str | None:
    if remote.load is not None:
        module, loader = remote.load
        try:
            getattr(import_module(f"..{module}", __name__), loader)(path)
        except ValueError as error:
            return str(error)
        return None
    size = path.stat().st_size
    if size != remote.size:
        return f"{size} bytes, expected {remote.size}"
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
    if sha256.hexdigest() != remote.sha256:
        return f"sha256 {sha256.hexdigest()}, expected {remote.sha256}"
    return None


def _fetch(remote: RemoteFile, part: Path, path: Path, progress: bool) -> None:
    """Append to `part` what it lacks; all of it where the server does not know ranges."""
    have = part.stat().st_size if part.exists() else 0
    have = have if remote.size is not None and have < remote.size else 0
    with _open(remote, path, have) as response:
        have = have if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        size = remote.size if length is None else have + int(length)
        if remote.size not in (None, size):
            part.unlink(missing_ok=True)
            raise ValueError(f"'{remote.url}' has {size} bytes, expected {remote.size}: another file")
        bar = tqdm(desc=path.name, total=size, initial=have, unit="B", unit_scale=True, disable=not progress)
        with bar, part.open("ab" if have else "wb") as file:
            for chunk in _chunks(response, remote, path):
                file.write(chunk)
                bar.update(len(chunk))
                have += len(chunk)
                if size is not None and have > size:
                    return  # another file: the verification says so
    if size is not None and have < size:
        raise _unreachable(remote, path, f"broke off after {have} of {size} bytes; a new call goes on from there")


def _open(remote: RemoteFile, path: Path, start: int) -> HTTPResponse:
    headers = {"User-Agent": "knowedit_ext", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urlopen(Request(remote.url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        raise _unreachable(remote, path, f"HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise _unreachable(remote, path, str(getattr(error, "reason", error))) from error
    given = response.headers.get("Content-Range", "")
    if response.status == 206 and not given.startswith(f"bytes {start}-"):
        response.close()
        raise _unreachable(remote, path, f"asked for the bytes from {start} on, the server sent '{given}'")
    return response


def _chunks(response: HTTPResponse, remote: RemoteFile, path: Path) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, HTTPException) as error:
            raise _unreachable(
                remote, path, f"{error or type(error).__name__}; a new call goes on from there"
            ) from error
        if not chunk:
            return
        yield chunk


def _unreachable(remote: RemoteFile, path: Path, reason: str) -> ConnectionError:
    known = "" if remote.size is None else f" ({remote.size} bytes, sha256 {remote.sha256})"
    return ConnectionError(
        f"cannot download {remote.url}: {reason}. Without a connection, fetch it elsewhere{known} and put it at "
        f"'{path}'; $KNOWEDIT_CACHE names another cache folder"
    )
