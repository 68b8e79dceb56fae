"""Malformed values: texts, JSON, bytes, arrays. Everything is drawn from a `Random`, so that a seed gives it again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np

LONG = 20_000
TEXTS = (
    "",
    " ",
    "\n",
    "\t \n",
    "{}",
    "{} {}",
    "{",
    "}{",
    "{0}",
    "%s",
    "\0",
    "a\0b",
    "\u200b",  # zero width space
    "\u200d\u2060",
    "\ufeff",  # byte order mark
    "\u202eabc\u202c",  # right to left override
    "שלום עולם",
    "مرحبا بالعالم",
    "中国的首都是北京",
    "e\u0301\u0301\u0301",
    "👩‍👩‍👧‍👦",
    "\ud800",  # half a surrogate pair: JSON can hold it, UTF-8 cannot
    "<s>",
    "</s>",
    "<|endoftext|>",
    "../../etc/passwd",
    "/",
    "nan",
    "-inf",
    "1e999",
    "0.5",
    "true",
    "null",
    "w" * LONG,
    "word " * (LONG // 5),
)
NUMBERS = (0, 1, -1, 2, 7, 10**6, 2**31, 2**63, -(2**63), 10**400, 0.0, -0.0, 0.5, 1.5, 1e-320, 1e308, -1e308)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": None},
    ["{}"],
    {"str": ""},
    {"str": "x"},
    [1, 2],
)


def value(random: Random) -> Any:
    """Something of another kind, or at the edge of what a kind can hold."""
    pool = random.choice((TEXTS, NUMBERS, NOT_FINITE, OTHERS, "deep"))
    if pool == "deep":
        nested: Any = random.choice(("x", 1, None))
        for _ in range(random.choice((3, 50, 150))):
            nested = [nested] if random.random() < 0.5 else {"a": nested}
        return nested
    return copy.deepcopy(random.choice(pool))


def text(random: Random, given: str) -> str:
    """The text with something put in, taken out, doubled, or in another place."""
    at, other = sorted(random.randint(0, len(given)) for _ in range(2))
    change: Callable[[], str] = random.choice(
        (
            lambda: given[:at] + random.choice(TEXTS) + given[at:],
            lambda: given[:at] + given[other:],
            lambda: given[:other] + given[at:other] + given[other:],
            lambda: given[::-1],
            lambda: random.choice(TEXTS),
            lambda: given[:at] + chr(random.randint(1, 0xD7FF)) + given[at:],
            lambda: given.upper(),
            lambda: given.replace("{}", ""),
            lambda: given.replace(" ", ""),
        )
    )
    return change()


def json_value(random: Random, given: Any, times: int | None = None) -> Any:
    """A copy of a JSON value with a few of its places changed."""
    given = copy.deepcopy(given)
    for _ in range(random.choice((1, 1, 1, 2, 4)) if times is None else times):
        given = _changed(random, given)
    return given


def _changed(random: Random, given: Any) -> Any:
    places = list(_places(given))
    if not places or random.random() < 0.02:
        return value(random)
    holder, key = random.choice(places)
    change = random.random()
    if change < 0.45:
        holder[key] = value(random)
    elif change < 0.7:
        old = holder[key]
        holder[key] = text(random, old) if isinstance(old, str) else [old] if random.random() < 0.5 else str(old)
    elif change < 0.85:
        del holder[key]
    elif isinstance(holder, dict):
        holder[random.choice((str(key) + "x", str(key).upper(), "extra", ""))] = (
            holder[key] if random.random() < 0.5 else holder.pop(key)
        )
    else:
        holder.insert(random.randint(0, len(holder)), copy.deepcopy(holder[key]))
    return given


def _places(given: Any):
    """(container, key) of everything inside, however deep."""
    items = given.items() if isinstance(given, dict) else enumerate(given) if isinstance(given, list) else ()
    for key, inner in list(items):
        yield given, key
        yield from _places(inner)


def octets(random: Random, given: bytes) -> bytes:
    """Damage: bits flipped, a piece lost, doubled, zeroed or foreign, nothing left."""
    data = bytearray(given)
    at, other = sorted(random.randint(0, len(data)) for _ in range(2))
    change = random.randint(0, 8)
    if change <= 2:
        for _ in range(random.choice((1, 1, 1, 8))):
            if data:
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif change == 3:
        del data[at:]
    elif change == 4:
        del data[at:other]
    elif change == 5:
        data[at:other] = bytes(other - at)
    elif change == 6:
        data[at:at] = data[at:other]
    elif change == 7:
        data[at:other] = random.randbytes(other - at)
    else:
        others = (b"", b"\0", b"{}", b"[]", b"PK\x05\x06" + bytes(18), b"\x80\x04N.", b"[" * 100_000, given * 2)
        data = bytearray(random.choice(others))
    return bytes(data)


def array(random: Random, given: np.ndarray) -> Any:
    """An array of another shape, dtype, with a number that is none, or no array."""
    if not given.ndim:
        given = given[None] if random.random() < 0.3 else np.array([given])[:, None]
    changes: Sequence[Callable[[], Any]] = (
        lambda: given.astype(random.choice((np.float16, np.int64, bool, np.complex128, "U8"))),
        lambda: given.reshape(-1),
        lambda: given[..., None],
        lambda: given[:0],
        lambda: given[1:],
        lambda: np.array(random.choice(NOT_FINITE)),
        lambda: np.full_like(given, random.choice(NOT_FINITE)) if given.dtype.kind == "f" else given,
        lambda: _one_replaced(random, given),
        lambda: given * 1e38 if given.dtype.kind == "f" else given,
        lambda: np.array(random.choice(TEXTS[:-2])),
        lambda: np.array(json_value(random, 1, 0)),
        lambda: np.zeros_like(given),
    )
    return random.choice(changes)()


def _one_replaced(random: Random, given: np.ndarray) -> np.ndarray:
    found = given.copy()
    if found.dtype.kind == "f" and found.size:
        found.reshape(-1)[random.randrange(found.size)] = random.choice((*NOT_FINITE, 1e38))
    return found
