"""Run a script of another library on us, unchanged: `python -m knowedit_ext.compat.easyedit script.py ARGS...`.

    ... script.py ARGS...       as `python script.py ARGS...`; the current folder is searched for imports too
    ... -m package.module ARGS...   as `python -m package.module ARGS...`

The library's functions become ours as its modules are imported. Where there is no GPU, "cuda" means the CPU.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .swap import Backend

USAGE = "usage: python -m {module} SCRIPT.py [ARGS...]  |  python -m {module} -m PACKAGE.MODULE [ARGS...]"


class CudaIsCPU(TorchFunctionMode):
    """Inside, what asks for a CUDA device gets the CPU: `x.to("cuda")`, `x.cuda()`, `torch.zeros(3, device="cuda")`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: _on_cpu(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.to:
            args = (args[0], *map(_on_cpu, args[1:]))
        return func(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


def main(backend: Backend, argv: Sequence[str] | None = None) -> None:
    """Never returns from a script that ends by `sys.exit`; its exceptions are its own."""
    argv = list(sys.argv[1:] if argv is None else argv)
    by_module = argv[:1] == ["-m"]
    rest = argv[by_module:]
    if not rest or (not by_module and not Path(rest[0]).is_file()):
        usage = USAGE.format(module=f"knowedit_ext.compat.{backend.command}")
        raise SystemExit(f"no such script: {rest[0]}\n{usage}" if rest else usage)
    sys.argv = rest
    if by_module:
        sys.path[0] = os.getcwd()
    else:
        sys.path[:1] = [str(Path(rest[0]).resolve().parent), os.getcwd()]
    with ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(CudaIsCPU())
        backend.install(only_as_imported=True)
        stack.callback(backend.uninstall)
        name = rest[0] if by_module else _module_at(backend, Path(rest[0]))
        if name in backend.modules:  # its functions are ours only where it is imported
            importlib.import_module(name).main()
        elif by_module:
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(rest[0], run_name="__main__")


def _module_at(backend: Backend, script: Path) -> str | None:
    """The module of the table that a script's file is."""
    tail = script.resolve().with_suffix("").parts
    return next((m for m in backend.modules if tuple(m.split(".")) == tail[-m.count(".") - 1 :]), None)
