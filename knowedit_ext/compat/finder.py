"""An import hook: says when a module has been executed, and supplies the one that transformers has dropped."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Collection, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

DROPPED = "transformers.modeling_attn_mask_utils"


class Finder(MetaPathFinder):
    """watched: names of modules; `done` is called with each of them behind its execution, while `watching`."""

    def __init__(self, watched: Collection[str], done: Callable[[ModuleType], None]) -> None:
        self.watched, self.done, self.watching = frozenset(watched), done, False
        self._inside = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        wanted = name == DROPPED or (self.watching and name in self.watched)
        asked = self._inside.__dict__.setdefault("names", set())
        if not wanted or name in asked:
            return None
        asked.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            asked.discard(name)
        if name == DROPPED:
            return spec or ModuleSpec(name, Dropped())
        if spec is not None and spec.loader is not None:
            self._announce(spec.loader)
        return spec

    def _announce(self, loader: Loader) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.done(module)

        loader.exec_module = exec_module


class Dropped(Loader):
    """transformers.modeling_attn_mask_utils of transformers 4: EasyEdit's UnKE imports two names of it."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        from . import causal_masks

        module.__doc__ = causal_masks.__doc__
        for name in causal_masks.__all__:
            setattr(module, name, getattr(causal_masks, name))
