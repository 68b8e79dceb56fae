"""A method with its settings, as the lines of a study are named: "memit", "memit+history:mu=1,layers=5-9"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..editing.method import Method
from ..editing.methods import method_of
from ..editing.params import LayerParams

HISTORY = "history"
SHORT = {"mu": "update_norm_lambda", "lambda": "mom2_update_weight"}  # as the papers write them
Given = LayerParams | Mapping[str, Any] | str | Path


@dataclass(frozen=True)
class Treatment:
    """label: as it was asked for, and as tables call it. history: edits are made with `earlier=` those before them."""

    label: str
    method: Method
    params: LayerParams
    history: bool

    @classmethod
    def of(cls, label: str, params: Given | None, by_method: Mapping[str, Given]) -> Treatment:
        """METHOD[+history][:parameter=value,...], on top of the method's own parameters, or of those for all.

        params: a preset's name that all methods have, or parameters as `Method.params_of` takes them. A list is
        spelled with "/", or as a range: layers=3/5, layers=5-9. Raises ValueError that names the label.
        """
        match = re.fullmatch(rf"\s*([a-z0-9_-]+?)\s*(\+\s*{HISTORY})?\s*(?::(.*))?", label)
        if match is None:
            raise ValueError(f"method '{label}': expected METHOD, METHOD+{HISTORY} or either with :parameter=value,...")
        method = method_of(match[1])
        if match[2] and not method.takes("earlier"):
            raise ValueError(f"method '{label}': {method.name} has no history")
        base = by_method.get(method.name, params)
        if base is None:
            raise ValueError(f"method '{label}': no parameters of {method.name}; its presets: {_listed(method)}")
        try:
            values = method.params_of(base).to_dict() | _settings(match[3], method)
            return cls(re.sub(r"\s", "", label), method, method.params_of(values), bool(match[2]))
        except ValueError as error:
            raise ValueError(f"method '{label}': {error}") from error

    @property
    def uses_moments(self) -> bool:
        return self.method.uses_moments(self.params)

    def describe(self) -> dict[str, Any]:
        return {"method": self.method.name, "params": self.params.to_dict(), "history": self.history}


def treatments(
    labels: Sequence[str], params: Given | None = None, by_method: Mapping[str, Given] | None = None
) -> list[Treatment]:
    """The lines of a study; ValueError for none, and for two that are one."""
    made = [Treatment.of(label, params, by_method or {}) for label in labels]
    if not made:
        raise ValueError("no methods to study")
    for n, one in enumerate(made):
        same = next((other for other in made[:n] if other.describe() == one.describe()), None)
        if same is not None:
            raise ValueError(f"methods '{same.label}' and '{one.label}' are the same")
    return made


def _settings(text: str | None, method: Method) -> dict[str, Any]:
    values: dict[str, Any] = {}
    known = [field.name for field in fields(method.params)]
    for part in text.split(",") if text is not None else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name = SHORT.get(name, name)
        if not equals or not value or name not in known:
            raise ValueError(f"'{part}' is no parameter=value: parameters are {', '.join(known)}")
        if name in values:
            raise ValueError(f"{name} is given twice")
        values[name] = _value(value)
    return values


def _value(text: str) -> Any:
    if span := re.fullmatch(r"(\d+)-(\d+)", text):
        return list(range(int(span[1]), int(span[2]) + 1))
    if "/" in text:
        return [_value(part) for part in text.split("/")]
    if text in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text]
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return text


def _listed(method: Method) -> str:
    return ", ".join(method.presets) or "none"
