"""What an editing method is to all that is around it: a row of the table `methods.METHODS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import PARAMETER_FILES
from ..model.load import EditableModel
from .edit import Edit
from .params import LayerParams


@dataclass(frozen=True)
class Method:
    """name: what commands, saved edits and results call it; title: one line of help.

    edit: (model, requests, params, **options) -> `Edit` of all requests together.
    params: the class of its parameters, with presets. check: ValueError for parameters that are another method's.
    each: the same arguments -> an edit of each request by itself, computed together; None: one after the other.
    contexts: (model, params, seed) -> the contexts that `edit` would generate, so that many edits can share them.
    values: (model, requests, params, contexts=) -> what `edit` takes as values=, by `params.of_values()` alone.
    single: one fact an edit. many: made for many facts at once: evaluated so, unless asked otherwise.
    """

    name: str
    title: str
    edit: Callable[..., Edit]
    params: type[LayerParams]
    check: Callable[[Any], None] = lambda params: None
    each: Callable[..., Sequence[Edit]] | None = None
    contexts: Callable[[EditableModel, Any, int], Any] | None = None
    values: Callable[..., Any] | None = None
    single: bool = False
    many: bool = False

    @property
    def options(self) -> list[str]:
        """What `edit` takes behind model, requests and params."""
        return list(inspect.signature(self.edit).parameters)[3:]

    def takes(self, option: str) -> bool:
        return option in self.options

    @property
    def presets(self) -> list[str]:
        """Names for `params_of`."""
        own = f"/{self.name}"
        return [name.removesuffix(own) for name, values in self.params.presets.items() if self._fits(values)]

    def _fits(self, values: Mapping[str, Any]) -> bool:
        try:
            self.check(self.params(**values))
        except ValueError:
            return False
        return True

    def params_of(self, given: LayerParams | Mapping[str, Any] | str | Path) -> LayerParams:
        """Parameters from a preset's name, a JSON or YAML file with the published keys, those keys, or as they are."""
        if isinstance(given, Mapping):
            params = self.params.from_dict(dict(given))
        elif isinstance(given, (str, Path)) and Path(given).suffix in PARAMETER_FILES:
            params = self.params.from_file(given)
        elif isinstance(given, str):
            name = next((n for n in (f"{given}/{self.name}", given) if n in self.params.presets), None)
            if name is None:
                there = ", ".join(self.presets)
                raise ValueError(
                    f"no {self.name} preset '{given}': there are {there}; or a file ({', '.join(PARAMETER_FILES)})"
                )
            params = self.params.preset(name)
        elif isinstance(given, self.params):
            params = given
        else:
            raise TypeError(f"params of {self.name} are {type(given).__name__}: expected {self.params.__name__}")
        self.check(params)
        return params

    def keeps_values(self, params: LayerParams) -> bool:
        """Can values be computed before the edits? Not where each layer has its own, which depends on those below."""
        return self.values is not None and (self.many or len(params.layers) == 1)

    def uses_moments(self, params: LayerParams) -> bool:
        """Do edits with these parameters need moments of their layers?"""
        return self.takes("moments") and getattr(params, "mom2_adjustment", True)

    def check_options(self, options: Iterable[str]) -> None:
        """TypeError for an option that the method does not take."""
        for option in options:
            if not self.takes(option):
                raise TypeError(f"{self.name} takes no '{option}': there are {', '.join(self.options)}")
