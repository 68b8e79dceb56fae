"""What people give, read as the annotated type: every value becomes that type, within its limits, or a ValueError."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knowedit_ext.checks import Above, Below, Count, Least, as_type, text, typed

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**300, 10**400)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3)
    | st.sampled_from(["1e-3", "5", "0x10", "nan", "1e999", "٣", "1_0", " 7 ", "true"])
    | st.sampled_from(
        [
            np.float32("nan"),
            np.int8(3),
            np.bool_(True),
            np.zeros(3),
            np.zeros((2, 2)),
            Fraction(1, 2),
            1j,
            object(),
            int,
        ]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(ANYTHING, st.booleans())
def test_a_number_or_an_error(value: object, spelled: bool) -> None:
    for kind, right in (
        (Annotated[float, Above(0)], lambda x: type(x) is float and math.isfinite(x) and x > 0),
        (Annotated[int, Least(1), Below(2**32)], lambda x: type(x) is int and 1 <= x < 2**32),
        (float | None, lambda x: x is None or (type(x) is float and math.isfinite(x))),
        (bool, lambda x: type(x) is bool),
        (str, lambda x: type(x) is str),
        (Literal["a", "b"], lambda x: x in ("a", "b")),
        (tuple[int, ...], lambda x: type(x) is tuple and all(type(n) is int for n in x)),
        (tuple[tuple[int, float], ...], lambda x: all((type(a), type(b)) == (int, float) for a, b in x)),
        (Sequence[str], lambda x: type(x) is list and all(type(one) is str for one in x)),
        (float | str | None, lambda x: x is None or type(x) in (float, str)),
    ):
        try:
            checked = as_type("it", value, kind, spelled)
        except ValueError as error:
            assert "it" in str(error) and "expected" in str(error) or "surrogate" in str(error)
            assert len(str(error)) < 300
        else:
            assert right(checked)
            assert as_type("it", checked, kind) == checked


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers())
def test_text_is_the_number_that_it_spells(number: float, whole: int) -> None:
    assert as_type("it", repr(number), float, spelled=True) == number == as_type("it", number, float)
    assert as_type("it", str(whole), int, spelled=True) == whole == as_type("it", whole, int)
    for spelled, kind in ((repr(number), float), (str(whole), int)):
        with pytest.raises(ValueError, match="it is '.*': expected a"):
            as_type("it", spelled, kind)


@pytest.mark.parametrize(
    "value, kind, message",
    [
        (-1, Annotated[int, Least(0)], "it is -1: expected at least 0"),
        (0.0, Annotated[float, Above(0)], "it is 0.0: expected a number above 0"),
        (2**32, Annotated[int, Below(2**32, "2**32")], r"it is 4294967296: expected a number below 2\*\*32"),
        (10**400, float, "it is 1000.*: expected a number, and not one as large"),
        ("a", Literal[None, "b"], "unknown it 'a': expected None or 'b'"),
        (1, Literal[True, "b"], "unknown it 1"),
        ("a\ud800", str, "half of a character"),
    ],
)
def test_the_words(value: object, kind: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_type("it", value, kind)


def test_the_current_folder_is_not_taken_for_no_folder() -> None:
    with pytest.raises(ValueError, match="out is '': expected a path, and the current folder is '.'"):
        as_type("out", "", str | Path | None)
    for place in (None, ".", Path("."), "folder"):
        assert as_type("out", place, str | Path | None) == place


def test_text_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"it must be a string, not list: \['a'\]"):
        text("it", ["a"])


class Thing:
    made_by = "make_thing"


@typed
def taking(
    thing: Thing,
    many: Iterable[int] = (),
    count: Count = 1,
    *,
    names: Sequence[str] = (),
    ridge: float | str | None = None,
    path: str | Path | None = None,
    act: Callable[[int], int] | float = 1,
    anything: Any = None,
    **more: Any,
) -> tuple:
    """Says what it got."""
    return count, names, ridge, path, act, many, more


def test_the_arguments_of_a_function() -> None:
    assert taking(Thing()) == (1, (), None, None, 1, (), {})
    assert taking(Thing(), 3, np.int64(2), names=("a",), ridge=1, path="b", act="c", d=4) == (
        *(2, ["a"], 1.0, "b", "c"),
        *(3, {"d": 4}),
    )
    assert taking.__doc__ == "Says what it got."


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(thing=[1]), TypeError, r"thing is \[1\]: expected Thing, which make_thing gives"),
        (dict(thing=object()), TypeError, "thing is a object: expected Thing"),
        (dict(count=0), ValueError, "count is 0: expected at least 1"),
        (dict(count=True), ValueError, "count is True: expected a whole number"),
        (dict(count="2"), ValueError, "count is '2': expected a whole number"),
        (dict(names="ab"), ValueError, "names is 'ab': expected a list"),
        (dict(names=[1]), ValueError, r"names\[0\] is 1: expected text"),
        (dict(ridge=math.nan), ValueError, "ridge is nan: expected a number or text"),
        (dict(ridge=True), ValueError, "ridge is True: expected a number or text"),
        (dict(path=3), ValueError, "path is 3: expected text or a path"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        taking(**{"thing": Thing()} | arguments)


def test_a_call_that_fits_no_signature() -> None:
    with pytest.raises(TypeError, match=r"taking\(\) missing 1 required positional argument: 'thing'"):
        taking()
