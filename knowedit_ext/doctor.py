"""`knowedit doctor`: what is installed, which native bodies run, why one does not, and the way out."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from knowedit_ext.ops import _native

from .extras import EXTRAS

PACKAGES = ("knowedit_ext", "torch", "transformers", "numpy", "scipy", "safetensors")


def report() -> str:
    """The findings as text, one per line; a `->` line says what to do about the one above it."""
    return "\n".join([*_versions(), "", *_extras(), "", *_native_cpu(), *_native_cuda(), "", *_torch_cuda()])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed (run from a source tree)"


def _versions() -> list[str]:
    lines = [f"python        {platform.python_version()}, {platform.system()} {platform.machine()}"]
    lines += [f"{name:<13} {_version(name)}" for name in PACKAGES]
    lines.append(f"package       {Path(__file__).parent}")
    lines.append(f"threads       {torch.get_num_threads()} of {os.cpu_count()} cores (torch.set_num_threads)")
    return lines


def _extras() -> list[str]:
    lines = []
    for name, purpose in EXTRAS.values():
        try:
            lines.append(f"{name:<13} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines += [f"{name:<13} no: {purpose}", f"  -> pip install {name}"]
    return lines


def _native_cpu() -> list[str]:
    native, reason = _native.status("cpu")
    if native is not None:
        return [f"native cpu    yes: {native.cpu_isa()} in use, {', '.join(native.cpu_isas())} usable"]
    lines = [f"native cpu    no: {reason}", "  plain-torch bodies run instead: same numbers, slower"]
    if "No module named" in reason:
        lines.append("  -> `pip install .` builds it; in a source tree `make build` does (a C++17 compiler is needed)")
    elif "built" not in reason:  # else the reason tells the way out
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        lines.append(f"  -> it was built for another machine or Python than this {version}: reinstall it here")
    if _native.required():
        lines.append("  -> KNOWEDIT_REQUIRE_NATIVE is set: ops raise until this is mended or the variable is unset")
    return lines


def _native_cuda() -> list[str]:
    native, reason = _native.status("cuda")
    if native is not None:
        built = ", ".join(f"sm_{arch.removesuffix('-real')}" for arch in native.cuda_archs())
        return [f"native cuda   yes: built for {built} (compiled, not yet proven on a GPU by the project's own tests)"]
    lines = [f"native cuda   no: {reason}"]
    if torch.cuda.is_available():
        lines.append("  -> put nvcc on PATH and reinstall with KNOWEDIT_CUDA=ON")
    return lines


def _torch_cuda() -> list[str]:
    if torch.version.cuda is None:
        return ["torch cuda    no: this is a CPU build of torch"]
    if not torch.cuda.is_available():
        return [f"torch cuda    {torch.version.cuda}, but no usable GPU or driver was found"]
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = [
        f"  {i}: {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory >> 30} GiB" for i, gpu in enumerate(names)
    ]
    return [f"torch cuda    {torch.version.cuda}", *gpus]
