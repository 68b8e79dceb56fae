"""What people give, as the type that is wanted, or an error that names it.

`as_type` reads a value by an annotation, with its limits beside the type: `lr: Positive`. `read_fields` does so for a
dataclass, `typed` for a function's arguments. Truth values and what is not finite are no numbers.
"""

from __future__ import annotations

import inspect
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from reprlib import repr as brief
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Least:
    """A number of at least this."""

    least: float

    def __call__(self, number: float) -> str | None:
        return None if number >= self.least else f"at least {self.least}"


@dataclass(frozen=True)
class Above:
    """A number above this."""

    limit: float

    def __call__(self, number: float) -> str | None:
        return None if number > self.limit else f"a number above {self.limit}"


@dataclass(frozen=True)
class Below:
    """A number below this."""

    limit: float
    text: str = ""  # how the limit reads

    def __call__(self, number: float) -> str | None:
        return None if number < self.limit else f"a number below {self.text or self.limit}"


Count = Annotated[int, Least(1)]
Natural = Annotated[int, Least(0)]
Positive = Annotated[float, Above(0)]
NotNegative = Annotated[float, Least(0)]
Share = Annotated[float, Above(0), Below(1)]
Seed = Annotated[int, Least(0), Below(2**32, "2**32")]
Compat = Literal[None, "reference"]
StudyCompat = Literal[None, "reference", "hase"]  # "hase": as in google/belief-localization


def typed(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Decorates a function: its arguments are read by their annotations, as far as `as_type` knows these."""
    signature = inspect.signature(function)

    @cache
    def kinds() -> dict[str, Any]:
        hints = get_type_hints(function, include_extras=True)
        return {name: hints[name] for name in signature.parameters if name in hints and _is_known(hints[name])}

    @wraps(function)
    def read(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # its own error names the function
        for name, kind in kinds().items():
            if name in bound.arguments:
                bound.arguments[name] = as_type(name, bound.arguments[name], kind)
        return function(*bound.args, **bound.kwargs)

    return read


def read_fields(given: Any, spelled: bool = False) -> None:
    """Read the fields of a dataclass, frozen or not, by their annotations; see `as_type`."""
    hints = get_type_hints(type(given), include_extras=True)
    for field in fields(given):
        value = as_type(field.name, getattr(given, field.name), hints[field.name], spelled)
        object.__setattr__(given, field.name, value)


def as_type(name: str, value: Any, kind: Any, spelled: bool = False) -> Any:
    """`value` as what an annotation says: bool, int, float, str, Path, tuples and sequences of these, `Literal`,
    `Annotated` with limits, unions (the first that fits), and classes.

    A lone number stands for a list of one. spelled: numbers may come as text, as YAML 1.1 reads `5e-1`.
    Raises ValueError with the name, the value and what was expected; TypeError for what is not of a class.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        converted = as_type(name, value, inside[0], spelled)
        for limit in inside[1:]:
            if wanted := limit(converted):
                raise ValueError(f"{name} is {brief(value)}: expected {wanted}")
        return converted
    if origin in (Union, types.UnionType):
        return _union(name, value, inside, spelled)
    if origin is Literal:
        return one_of(name, value, inside)
    if origin in (tuple, Sequence):
        return _list(name, value, kind, spelled)
    if origin in (Mapping, dict) or kind not in _READERS:
        return _instance(name, value, origin or kind)
    return _READERS[kind](name, value, spelled)


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> Any:
    """`value`, which has to be one of those."""
    allowed = tuple(allowed)
    for one in allowed:
        if isinstance(value, type(one)) and value == one:
            return one
    choices = f"one of {', '.join(map(repr, allowed))}" if len(allowed) > 2 else " or ".join(map(repr, allowed))
    raise ValueError(f"unknown {name} {brief(value)}: expected {choices}")


def text(name: str, value: Any) -> str:
    """`value`, which has to be text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {type(value).__name__}: {brief(value)}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name} is {brief(value)}, with half of a character (a lone surrogate)")
    return value


def quoted(text: object) -> str:
    """A text as errors show it: in quotes, on one line, the middle of a long one left out."""
    shown = " ".join(str(text).splitlines())
    return f"'{shown}'" if len(shown) <= 240 else f"'{shown[:160]} ... {shown[-60:]}'"


def _is_known(kind: Any) -> bool:
    """Does `as_type` know this annotation, through and through?"""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _is_known(inside[0])
    if origin in (Union, types.UnionType, tuple, Sequence):
        return all(part in (Ellipsis, type(None)) or _is_known(part) for part in inside)
    if origin is None:
        return kind is not Any and isinstance(kind, type) and not getattr(kind, "_is_protocol", False)
    return origin in (Literal, Mapping, dict)


def _union(name: str, value: Any, kinds: Sequence[Any], spelled: bool) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not type(None)]
    if len(kinds) == 1:
        return as_type(name, value, kinds[0], spelled)
    if isinstance(value, str) and not value and set(kinds) == {str, Path}:
        raise ValueError(f"{name} is '': expected a path, and the current folder is '.'")
    for kind in kinds:
        try:
            return as_type(name, value, kind, spelled)
        except (ValueError, TypeError):
            pass
    error = TypeError if any(get_origin(kind) is None and kind not in _READERS for kind in kinds) else ValueError
    raise error(f"{name} is {_shown(value)}: expected {' or '.join(map(_said, kinds))}")


def _said(kind: Any) -> str:
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _said(inside[0])
    if origin is Literal:
        return " or ".join(map(repr, inside))
    if origin in (tuple, Sequence):
        return f"a list of {_said(inside[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return names.get(kind) or getattr(origin or kind, "__name__", str(kind))


def _shown(value: Any) -> str:
    """Values of our own and other people's classes can be long."""
    plain = value is None or isinstance(value, (bool, Real, str, bytes, list, tuple, dict))
    return brief(value) if plain else f"a {type(value).__name__}"


def _bool(name: str, value: Any, spelled: bool) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {_shown(value)}: expected true or false")
    return bool(value)


def _number(name: str, value: Any, spelled: bool, wanted: str) -> int | float:
    number = _spelled_out(value) if spelled and isinstance(value, str) else value
    if isinstance(number, Integral) and not isinstance(number, bool):
        return int(number)
    if not isinstance(number, Real) or isinstance(number, bool):
        raise ValueError(f"{name} is {_shown(value)}: expected {wanted}")
    if not math.isfinite(number):
        raise ValueError(f"{name} is {brief(value)}: expected {wanted}, and a finite one")
    return float(number)


def _spelled_out(value: str) -> int | float | str:
    for read in (int, float):
        try:
            return read(value)
        except ValueError:
            pass
    return value


def _int(name: str, value: Any, spelled: bool) -> int:
    number = _number(name, value, spelled, "a whole number")
    if number != int(number):
        raise ValueError(f"{name} is {brief(value)}: expected a whole number")
    return int(number)


def _float(name: str, value: Any, spelled: bool) -> float:
    number = _number(name, value, spelled, "a number")
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name} is {brief(value)}: expected a number, and not one as large") from None


def _str(name: str, value: Any, spelled: bool) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_shown(value)}: expected text")
    return text(name, value)


def _path(name: str, value: Any, spelled: bool) -> Any:
    if not isinstance(value, os.PathLike):
        raise ValueError(f"{name} is {_shown(value)}: expected a path")
    return value


def _list(name: str, value: Any, kind: Any, spelled: bool) -> Any:
    """A tuple or a list, as the annotation is one or a `Sequence`."""
    origin, inside = get_origin(kind), get_args(kind)
    many = origin is not tuple or inside[-1] is Ellipsis
    number = get_args(inside[0])[:1] == (int,) or inside[0] in (int, float)
    if many and number and (isinstance(value, Real) or (spelled and isinstance(value, str))):
        value = (value,)
    if isinstance(value, (str, bytes, Mapping, Set)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} is {_shown(value)}: expected a list")
    try:
        value = list(value)
    except TypeError:  # an array of no dimension
        raise ValueError(f"{name} is {brief(value)}: expected a list") from None
    if not many and len(value) != len(inside):
        raise ValueError(f"{name} is {brief(value)}: expected {len(inside)} values")
    kinds = inside[:1] * len(value) if many else inside
    items = zip(value, kinds, strict=True)
    members = [as_type(f"{name}[{n}]", one, part, spelled) for n, (one, part) in enumerate(items)]
    return tuple(members) if origin is tuple else members


def _instance(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        made_by = f", which {kind.made_by} gives" if hasattr(kind, "made_by") else ""
        raise TypeError(f"{name} is {_shown(value)}: expected {kind.__name__}{made_by}")
    return value


_READERS = {bool: _bool, int: _int, float: _float, str: _str, Path: _path}
