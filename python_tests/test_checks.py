"""What people give, read as the annotated type: every value becomes that type, within its limits, or a ValueError."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knowedit_ext.checks import Above, Below, Least, as_type, text

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
@given(ANYTHING)
def test_a_number_or_an_error(value: object) -> None:
    for kind, right in (
        (Annotated[float, Above(0)], lambda x: type(x) is float and math.isfinite(x) and x > 0),
        (Annotated[int, Least(1), Below(2**32)], lambda x: type(x) is int and 1 <= x < 2**32),
        (float | None, lambda x: x is None or (type(x) is float and math.isfinite(x))),
        (bool, lambda x: type(x) is bool),
        (str, lambda x: type(x) is str),
        (Literal["a", "b"], lambda x: x in ("a", "b")),
        (tuple[int, ...], lambda x: type(x) is tuple and all(type(n) is int for n in x)),
        (tuple[tuple[int, float], ...], lambda x: all((type(a), type(b)) == (int, float) for a, b in x)),
    ):
        try:
            found = as_type("it", value, kind)
        except ValueError as error:
            assert "it" in str(error) and "expected" in str(error) or "surrogate" in str(error)
            assert len(str(error)) < 300
        else:
            assert right(found)
            assert as_type("it", found, kind) == found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers())
def test_text_is_the_number_that_it_spells(number: float, whole: int) -> None:
    assert as_type("it", repr(number), float) == number == as_type("it", number, float)
    assert as_type("it", str(whole), int) == whole == as_type("it", whole, int)


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


def test_text_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"it must be a string, not list: \['a'\]"):
        text("it", ["a"])
