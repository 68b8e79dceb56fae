"""Which functions of another library are ours, and how they come and go.

What is swapped are the innermost heavy functions, where modules look them up: their globals. Whatever was bound before
(tables of algorithms, a user's own imports) then calls ours through the library's own outer functions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from .finder import Finder

logger = logging.getLogger(__name__)


class MovedError(ValueError):
    """The other library does not have its functions where this version expects them."""


class NotServed(ValueError):
    """What we cannot do as the other library does: its own function does it where there is one."""


@dataclass(frozen=True)
class Swap:
    """A function `name` of `module` that takes at least the arguments `takes`, and ours for it.

    ours: takes the same arguments and `upstream=`, what is swapped; raises `NotServed` before it has done anything.
    name: "Class.method" for a method. optional: only speed is lost where the library has no such function.
    """

    module: str
    name: str
    takes: tuple[str, ...]
    ours: Callable[..., Any]
    optional: bool = False

    def holder(self, module: ModuleType) -> Any:
        """What has the function as an attribute: the module, or a class in it."""
        return getattr(module, self.name.split(".")[0], None) if "." in self.name else module

    @property
    def attribute(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    def missing(self, module: ModuleType | None) -> str | None:
        """What is not as expected, in words."""
        function = None if module is None else getattr(self.holder(module), self.attribute, None)
        where = f"{self.module}.{self.name}({', '.join(self.takes)})"
        if not callable(function):
            return where
        taken = inspect.signature(function).parameters
        anything = any(p.kind is p.VAR_POSITIONAL for p in taken.values())
        if lacking := [name for name in self.takes if name not in taken and not anything]:
            return f"{where} (it takes no {', '.join(lacking)})"
        return None

    def arguments(self, function: Callable[..., Any]) -> Callable[[tuple, dict[str, Any]], tuple[tuple, dict]]:
        """From a call of the library's `function` to one of ours: by name, wherever a version has them.

        NotServed: arguments that ours does not know, but at their defaults; and a call that `function` itself refuses.
        """
        signature, known = inspect.signature(function), inspect.signature(self.ours).parameters
        kinds = {name: p.kind for name, p in signature.parameters.items()}
        anything = any(p.kind is p.VAR_KEYWORD for p in known.values())

        def given(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            try:
                named = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise NotServed(str(error)) from error
            if inspect.Parameter.VAR_POSITIONAL in kinds.values():
                return args, kwargs
            for name in [n for n, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD]:
                named |= named.pop(name, {})
            own = (named.pop(next(iter(kinds))),) if "." in self.name else ()  # of a method: what it belongs to
            if not anything:
                more = [name for name in named if name not in known]
                defaults = {name: p.default for name, p in signature.parameters.items()}
                if asked := [n for n in more if n not in defaults or not _same(named[n], defaults[n])]:
                    raise NotServed(f"it is given {', '.join(asked)}, which ours does not know")
                named = {name: value for name, value in named.items() if name in known}
            return own, named

        return given


def _same(value: Any, default: Any) -> bool:
    plain = (bool, int, float, str, type(None))
    return value is default or (type(value) is type(default) and isinstance(value, plain) and value == default)


@dataclass(frozen=True)
class Upstream:
    """What was swapped: the function and the module it is looked up in."""

    module: ModuleType
    function: Callable[..., Any]


class Backend:
    """The table of one library (or of several of one family) and what is swapped of it at the moment.

    command: the module of ours that has it. library: its name, for messages. packages: its top-level packages. roots:
    those that `install` imports, where they are there; at least one is needed. Safe to use from several threads; a swap
    is seen by all of them.
    """

    def __init__(
        self, command: str, library: str, packages: Sequence[str], roots: Sequence[str], table: Sequence[Swap]
    ) -> None:
        self.command, self.library = command, library
        self.packages, self.roots, self.table = tuple(packages), tuple(roots), tuple(table)
        self.modules = frozenset(swap.module for swap in table)
        self._lock = threading.RLock()
        self._calls: Counter[str] = Counter()
        self._made: weakref.WeakSet[FunctionType] = weakref.WeakSet()
        self._logged: set[str] = set()
        self._active = self._asked = False
        self._blocks = 0
        self._finder = Finder(self.modules, self._imported)

    # -- coming and going ------------------------------------------------------------------------------------------

    def install(self, only_as_imported: bool = False) -> None:
        """Swap: in what is imported now, and in what will be imported later. Once is enough, twice does no harm.

        only_as_imported: import nothing of the library by ourselves. Raises ImportError where the library is not to be
        found, `MovedError` that names each function which is not where it was; nothing is swapped then.
        """
        with self._lock:
            self._asked = True
            try:
                self._enter(only_as_imported)
            except BaseException:
                self._asked = False
                raise

    def uninstall(self) -> None:
        """Every global as it was."""
        with self._lock:
            self._asked, self._blocks = False, 0
            self._leave()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Swapped inside a `with`; what was installed before stays."""
        with self._lock:
            self._enter(False)
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks = max(0, self._blocks - 1)
                if not self._asked and not self._blocks:
                    self._leave()

    def calls(self) -> dict[str, int]:
        """How often each of our functions ran (not: was handed back), since the process began."""
        with self._lock:
            return dict(self._calls)

    def _enter(self, only_as_imported: bool) -> None:
        if self._active:
            return
        sys.meta_path.insert(0, self._finder)
        try:
            self._finder.watching = False  # first import, then look, then swap: all or nothing
            expected = set() if only_as_imported else self._import()
            here = [swap for swap in self.table if swap.module in expected or swap.module in sys.modules]
            self._check(here)
            for swap in here:
                self._swap(swap)
            self._finder.watching = self._active = True
        except BaseException:
            self._leave()
            raise

    def _import(self) -> set[str]:
        """Import the roots that are to be found; the modules of the table that should be in them."""
        roots = [root for root in self.roots if root in sys.modules or importlib.util.find_spec(root)]
        if not roots:
            raise ImportError(
                f"{self.library} is not to be found: put the folder of its clone on sys.path (there is no module "
                f"{' or '.join(self.roots)})"
            )
        expected = {swap.module for swap in self.table if swap.module.split(".")[0] in roots}
        needed = {*roots, *(swap.module for swap in self.table if not swap.optional)}
        for name in (*roots, *sorted(expected)):
            try:
                importlib.import_module(name)
            except ImportError as error:
                gone = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
                if name in needed and not gone:
                    raise  # something else is missing; that the module itself is gone is said with all the others
                if not gone:
                    logger.info("%s is left out: it cannot be imported (%s)", name, error)
        return expected

    def _check(self, swaps: Sequence[Swap]) -> None:
        findings = [(swap, swap.missing(sys.modules.get(swap.module))) for swap in swaps]
        if moved := [description for swap, description in findings if description and not swap.optional]:
            raise MovedError(
                f"{self.library} has moved what we swap, so nothing is swapped. Not found: {'; '.join(moved)}. Use the "
                "version that docs/dropin.md names"
            )

    def _imported(self, module: ModuleType) -> None:
        """A module of the table has just been executed."""
        with self._lock:
            swaps = [swap for swap in self.table if swap.module == module.__name__]
            try:
                self._check(swaps)
            except MovedError:
                self._asked, self._blocks = False, 0
                self._leave()
                raise
            for swap in swaps:
                self._swap(swap)

    def _leave(self) -> None:
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        self._active = False
        for module in self._modules():
            for name, value in list(vars(module).items()):
                if self._is_ours(value):
                    setattr(module, name, value.__wrapped__)
        for swap in self.table:
            holder = swap.holder(sys.modules[swap.module]) if swap.module in sys.modules else None
            value = vars(holder).get(swap.attribute) if holder is not None else None
            if self._is_ours(value):
                setattr(holder, swap.attribute, value.__wrapped__)

    def _swap(self, swap: Swap) -> None:
        """In its own place, and under every name by which modules of the library imported it."""
        home = sys.modules.get(swap.module)
        if swap.missing(home) is not None:  # an optional one
            return
        holder = swap.holder(home)
        original = getattr(holder, swap.attribute)
        if self._is_ours(original):
            return
        ours = self._wrapped(swap, Upstream(home, original))
        setattr(holder, swap.attribute, ours)
        for module in self._modules():
            for name, value in list(vars(module).items()):
                if value is original:
                    setattr(module, name, ours)

    def _modules(self) -> list[ModuleType]:
        modules = [(name, module) for name, module in list(sys.modules.items()) if isinstance(module, ModuleType)]
        return [module for name, module in modules if name.split(".")[0] in self.packages]

    def _is_ours(self, value: Any) -> bool:
        """Not by its attributes: a wrapper around ours that somebody made with `functools.wraps` has them too."""
        return isinstance(value, FunctionType) and value in self._made

    # -- a swapped function ----------------------------------------------------------------------------------------

    def _wrapped(self, swap: Swap, upstream: Upstream) -> Callable[..., Any]:
        given = swap.arguments(upstream.function)

        @functools.wraps(upstream.function)
        def ours(*args: Any, **kwargs: Any) -> Any:
            if not self._active:  # somebody has kept it
                return upstream.function(*args, **kwargs)
            try:
                own, named = given(args, kwargs)
                result = swap.ours(*own, **named, upstream=upstream)
            except NotServed as reason:
                self._say(f"{self.library}'s own {swap.name} runs: {reason}")
                return upstream.function(*args, **kwargs)
            with self._lock:
                self._calls[swap.name] += 1
            return result

        ours._knowedit_backend = self
        self._made.add(ours)
        return ours

    def _say(self, line: str) -> None:
        """Each reason once."""
        with self._lock:
            if line in self._logged:
                return
            self._logged.add(line)
        logger.warning("%s", line)
