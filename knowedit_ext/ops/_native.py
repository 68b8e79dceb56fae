"""Lazy loading of the native module. A load that fails keeps its true reason for whoever asks."""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from types import ModuleType

log = logging.getLogger(__name__)


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("knowedit_ext._C"), ""
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


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
