"""Published rules for the level of noise, as they are spelled."""

from __future__ import annotations

import math

from .checks import quoted


def read_rule(rule: str) -> tuple[str, float]:
    """ "s3" -> ("s", 3.0), "0.1" -> ("", 0.1), "m" -> ("m", 1.0); ValueError for what is no rule."""
    kind, number = (rule[0], rule[1:]) if rule[:1] in ("s", "u", "m", "t") else ("", rule)
    try:
        value = float(number) if number else 1.0
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or bool(number) == (kind == "m"):  # "m" stands alone, the rest need one
        raise ValueError(f"unknown noise rule {quoted(rule)}: expected 's3', 'u0.1', 'm', 't5' or a number")
    return kind, value
