"""What people give, as the type that is wanted, or an error that names it.

`as_type` reads a value by an annotation, with its limits beside the type: `lr: Positive`. Numbers given as text count
as numbers (YAML 1.1 reads `5e-1` as text), truth values and what is not finite do not.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from numbers import Integral, Real
from reprlib import repr as brief
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np


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
    said: str = ""  # how the limit reads

    def __call__(self, number: float) -> str | None:
        return None if number < self.limit else f"a number below {self.said or self.limit}"


Count = Annotated[int, Least(1)]
Natural = Annotated[int, Least(0)]
Positive = Annotated[float, Above(0)]
NotNegative = Annotated[float, Least(0)]
Seed = Annotated[int, Least(0), Below(2**32, "2**32")]
Compat = Literal[None, "reference"]


def as_type(name: str, value: Any, kind: Any) -> Any:
    """`value` as what an annotation says: bool, int, float, str, tuples of these, `| None`, `Literal`, `Annotated`.

    A lone number stands for a list of one. Raises ValueError with the name, the value and what was expected.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = as_type(name, value, inside[0])
        for limit in inside[1:] if found is not None else ():
            if wanted := limit(found):
                raise ValueError(f"{name} is {brief(value)}: expected {wanted}")
        return found
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inside:
            return None
        return as_type(name, value, next(part for part in inside if part is not type(None)))
    if origin is Literal:
        return one_of(name, value, inside)
    if origin is tuple:
        return _tuple(name, value, inside)
    return _READERS[kind](name, value)


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> Any:
    """`value`, which has to be one of those."""
    allowed = tuple(allowed)
    for one in allowed:
        if isinstance(value, type(one)) and value == one:
            return one
    raise ValueError(f"unknown {name} {brief(value)}: expected {_either(allowed)}")


def text(name: str, value: Any) -> str:
    """`value`, which has to be text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {type(value).__name__}: {brief(value)}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name} is {brief(value)}, with half of a character (a lone surrogate)")
    return value


def _either(allowed: tuple[Any, ...]) -> str:
    if len(allowed) < 3:
        return " or ".join(map(repr, allowed))
    return f"one of {', '.join(map(repr, allowed))}"


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {brief(value)}: expected true or false")
    return bool(value)


def _number(name: str, value: Any, wanted: str) -> int | float:
    number = value
    if isinstance(value, str):
        for read in (int, float):
            try:
                number = read(value)
                break
            except ValueError:
                pass
    if isinstance(number, Integral) and not isinstance(number, bool):
        return int(number)
    if not isinstance(number, Real) or isinstance(number, bool):
        raise ValueError(f"{name} is {brief(value)}: expected {wanted}")
    if not math.isfinite(number):
        raise ValueError(f"{name} is {brief(value)}: expected {wanted}, and a finite one")
    return float(number)


def _int(name: str, value: Any) -> int:
    number = _number(name, value, "a whole number")
    if number != int(number):
        raise ValueError(f"{name} is {brief(value)}: expected a whole number")
    return int(number)


def _float(name: str, value: Any) -> float:
    number = _number(name, value, "a number")
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name} is {brief(value)}: expected a number, and not one as large") from None


def _str(name: str, value: Any) -> str:
    try:
        return text(name, value)
    except TypeError:
        raise ValueError(f"{name} is {brief(value)}: expected text") from None


def _tuple(name: str, value: Any, inside: tuple[Any, ...]) -> tuple[Any, ...]:
    many = inside[-1] is Ellipsis
    if many and isinstance(value, (Real, str)) and get_origin(inside[0]) is not tuple:
        value = (value,)
    if isinstance(value, (str, bytes, Mapping, Set)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} is {brief(value)}: expected a list")
    value = tuple(value)
    if not many and len(value) != len(inside):
        raise ValueError(f"{name} is {brief(list(value))}: expected {len(inside)} values")
    kinds = inside[:1] * len(value) if many else inside
    return tuple(as_type(f"{name}[{n}]", one, kind) for n, (one, kind) in enumerate(zip(value, kinds, strict=True)))


_READERS = {bool: _bool, int: _int, float: _float, str: _str}
