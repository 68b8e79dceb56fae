"""Editing methods by name, as what an evaluation asks for its edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..datasets.records import Record
from ..editing.contexts import memit_contexts, rome_contexts
from ..editing.edit import Edit
from ..editing.methods.finetune import FTParams, finetune
from ..editing.methods.memit import MEMITParams, memit
from ..editing.methods.rome import ROMEParams, rome_each
from ..editing.params import LayerParams
from ..model.identity import checksum
from ..model.load import EditableModel
from ..moments import Moments

PARAMS: dict[str, type[LayerParams]] = {"rome": ROMEParams, "memit": MEMITParams, "ft": FTParams, "ft-l": FTParams}
METHODS = ("none", *PARAMS)


@dataclass
class Editing:
    """Makes the edits of a group of records by one method (`evaluation.job.Method`).

    name: rome, memit, ft or ft-l. together: one edit of all records of a group (what `num_edits` is in the published
    code); else one a record, each made on the model as it is.
    """

    model: EditableModel
    name: str
    params: LayerParams
    moments: Moments | None = None
    together: bool = False
    seed: int = 0
    compat: str | None = None

    def __post_init__(self) -> None:
        if self.name not in PARAMS:
            raise ValueError(f"unknown method '{self.name}': expected one of {', '.join(PARAMS)}")
        if self.name == "rome" and self.together:
            raise ValueError("rome edits one fact at a time: memit edits many at once")
        self._contexts: Any = None

    def __call__(self, records: Sequence[Record]) -> Sequence[Edit] | Iterator[Edit] | Edit:
        if self.together:
            return self._one(records)
        if self.name == "rome":
            return rome_each(*self._arguments(records))
        return (self._one([record]) for record in records)  # one at a time: dense edits are as large as the weights

    def _one(self, records: Sequence[Record]) -> Edit:
        if self.name == "memit":
            return memit(*self._arguments(records))
        return finetune(self.model, records, self.params, self.compat)

    def _arguments(self, records: Sequence[Record]) -> tuple[Any, ...]:
        if self._contexts is None:  # generated once for all records, as published
            if self.name == "rome":
                self._contexts = rome_contexts(self.model, self.params.context_template_length_params, self.seed)
            else:
                self._contexts = memit_contexts(self.model, self.seed)
        return self.model, records, self.params, self.moments, self._contexts, self.compat

    def describe(self) -> dict[str, Any]:
        used = [] if self.moments is None else [n for n in self.params.layers if n in self.moments]
        return {
            "method": self.name,
            "params": self.params.to_dict(),
            "moments": {str(n): [self.moments[n].count, checksum(self.moments[n].matrix())] for n in used},
            "seed": self.seed,
            "compat": self.compat,
            "together": self.together,
        }


def params_of(method: str, given: str) -> LayerParams:
    """From a preset's name (that of ft-l is told by the method) or a JSON file with the published keys."""
    kind = PARAMS[method]
    if given.endswith(".json"):
        params = kind.from_json(given)
    else:
        params = kind.preset(f"{given}/{method}" if f"{given}/{method}" in kind.presets else given)
    bound = getattr(params, "norm_constraint", None)
    if method == "ft-l" and not bound:
        raise ValueError(f"'{given}' has no norm_constraint, which ft-l is fine-tuning with: that is method ft")
    if method == "ft" and bound:
        raise ValueError(f"'{given}' has norm_constraint {bound}: that is method ft-l")
    return params
