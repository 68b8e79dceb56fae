"""Numbers, layers, pairs and levels of noise as they are typed."""

from __future__ import annotations

from ..noise_rules import read_rule


def numbers_of(text: str) -> list[int] | None:
    """ "1,10,100"; None for nothing."""
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"'{text}' is no list of numbers: expected e.g. 1,10,100")
    return [int(part) for part in parts]


def noise_of(text: str) -> float | str:
    """A level of noise, or the rule for one."""
    kind, value = read_rule(text)
    return text if kind else value


def layers_of(ranges: str) -> list[int]:
    """Layers of "3,5,8-10": [3, 5, 8, 9, 10]."""
    layers: list[int] = []
    for part in ranges.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or int(last or first) < int(first):
            raise ValueError(f"'{ranges}' is no list of layers: expected e.g. 13-17, or 3,5,8-10")
        layers += range(int(first), int(last or first) + 1)
    return layers


def pair_of(text: str) -> tuple[str, str]:
    first, plus, second = (part.strip() for part in text.partition("+"))
    if not (first and plus and second):
        raise ValueError(f"--pair '{text}': expected two relation_ids, e.g. P19+P103")
    return first, second
