"""Lazy loading of the native module. A load that fails keeps its true reason for whoever asks."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import knowedit_ext

log = logging.getLogger(__name__)


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        native = importlib.import_module("knowedit_ext._C")
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"
    other = _of_other_sources(native)
    return (None, other) if other else (native, "")


def _of_other_sources(native: ModuleType) -> str:
    """In words, where the module was not built from this version, or from the csrc/ that lies beside the package."""
    where, version = getattr(native, "__file__", None), getattr(native, "version", "none")
    if version != knowedit_ext.__version__:
        return f"{where} is of version {version}, the package of {knowedit_ext.__version__}; build or install it again"
    digest = _sources_digest(Path(knowedit_ext.__file__).parents[1])
    if digest not in ("", native.sources):
        return f"{where} was built from another csrc/ than lies beside the package; build it again, with `make build`"
    return ""


def _sources_digest(root: Path) -> str:
    """Of the native sources, as CMakeLists.txt takes it; empty where there are none, as for an installed package."""
    if not (root / "csrc" / "bindings.cpp").is_file():
        return ""
    files = {path.relative_to(root).as_posix(): path for path in (root / "csrc").rglob("*.*")}
    kept = (name for name in sorted(files) if name.endswith((".cpp", ".h", ".cu", ".cuh")))
    lines = (
        f"{hashlib.sha256(files[name].read_bytes()).hexdigest()} {name}\n"
        for name in kept
        if not name.startswith("csrc/testing/")
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def required() -> bool:
    """True when KNOWEDIT_REQUIRE_NATIVE=1 forbids the plain-torch fallback."""
    return os.environ.get("KNOWEDIT_REQUIRE_NATIVE", "0") not in ("", "0")


def status(device: str = "cpu") -> tuple[ModuleType | None, str]:
    """The native module if it has bodies for `device` ("cpu" or "cuda"), else None and the true reason."""
    module, reason = _load()
    if module is not None and device == "cuda" and not module.cuda_archs():
        return None, "the native module was built without CUDA (KNOWEDIT_CUDA=ON needs nvcc)"
    return module, reason


def module(device: str) -> ModuleType | None:
    """The native module for `device`, or None after one warning; RuntimeError when native code is required."""
    native, reason = status(device)
    if native is None:
        if required():
            raise RuntimeError(f"KNOWEDIT_REQUIRE_NATIVE is set, but there is no native {device} code: {reason}")
        _warn_once(device, reason)
    return native


@cache
def _warn_once(device: str, reason: str) -> None:
    log.warning(
        "no native %s code (%s): using the slower plain-torch bodies; `knowedit doctor` tells the way out",
        device,
        reason,
    )
