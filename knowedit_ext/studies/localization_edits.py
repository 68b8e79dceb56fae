"""How the study of localization edits: its methods' windows, and what a problem changes of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..editing.edit import Edit
from ..editing.methods import method_of
from ..editing.methods.finetune import FTParams, finetune_each
from ..editing.methods.memit import MEMITParams, memit, memit_values
from ..editing.methods.rome import ROMEParams, rome_each
from ..editing.params import LayerParams
from ..editing.request import EditRequest
from ..model.load import EditableModel
from ..moments import Moments
from ..tracing.kinds import window_layers

# Of google/belief-localization's command lines for GPT-J; the layers are the study's.
PUBLISHED = {
    "ft": FTParams(layers=(0,), norm_constraint=1e-4),
    "rome": ROMEParams(layers=(0,)),
    "memit": MEMITParams(layers=(0,)),
}
PRESETS = {"ft": "ft-l", "rome": "rome", "memit": "memit"}  # the method whose preset a name is

# What a problem multiplies a method's own parameters by (FT's bounds: of a window of one layer, of several).
BOUNDS = {
    "error_injection": (1.0, 0.5),
    "tracing_reversal": (10.0, 10.0),
    "fact_erasure": (0.1, 0.1),
    "fact_amplification": (0.5, 0.1),
    "fact_forcing": (1.0, 1.0),
}


@dataclass(frozen=True)
class StudyMethod:
    """name: "rome", "memit" or "ft-N", trained in a window of N layers. window: layers it changes around the one it is
    said to edit. params: its own, with the layers still to come. optimises: a value, which a layer must carry on."""

    name: str
    window: int
    params: LayerParams

    @property
    def kind(self) -> str:
        return self.name.partition("-")[0]

    @property
    def optimises(self) -> bool:
        return self.kind != "ft"

    @property
    def uses_moments(self) -> bool:
        return getattr(self.params, "mom2_adjustment", False)

    def params_at(self, layer: int, layers: int, problem: str) -> LayerParams:
        """As published for each problem, in proportion to the method's own parameters."""
        params = replace(self.params, layers=window_layers(layer, self.window, layers))
        forcing = problem == "fact_forcing"
        if self.kind == "ft":
            bound = BOUNDS[problem][self.window > 1] * params.norm_constraint
            return replace(params, norm_constraint=bound, num_steps=params.num_steps * (2 if forcing else 1))
        if self.kind == "rome" and forcing:
            return replace(params, v_num_grad_steps=round(1.25 * params.v_num_grad_steps), v_lr=0.1 * params.v_lr)
        return params

    def edits(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        params: LayerParams,
        moments: Moments | None,
        contexts: Any,
        compat: str | None = None,
    ) -> Iterable[Edit]:
        """One edit a request: values of all are optimised at once; fine-tuning goes side by side, when asked for."""
        if self.kind == "ft":
            return finetune_each(model, requests, params, compat=compat)
        if self.kind == "rome":
            return rome_each(model, requests, params, moments, contexts=contexts, compat=compat)
        if compat is not None:  # its noise is drawn edit by edit
            return [memit(model, [request], params, moments, contexts, compat=compat) for request in requests]
        values = memit_values(model, requests, params, contexts=contexts)
        return [
            memit(model, [request], params, moments, contexts, values[n : n + 1]) for n, request in enumerate(requests)
        ]

    def contexts(self, model: EditableModel) -> Any:
        generate: Callable[..., Any] | None = method_of(PRESETS[self.kind]).contexts
        return None if generate is None else generate(model, self.params, 0)


def study_method(name: str, window: int, params: str | Mapping[str, Any] | None) -> StudyMethod:
    """params: None: as published; a preset of all, or for "ft", "rome" and "memit" what `ke.edit` takes."""
    kind, _, number = name.partition("-")
    if kind not in PUBLISHED or (kind == "ft") != number.isdecimal() or (number and not int(number)):
        raise ValueError(f"unknown method '{name}' of the study: expected rome, memit, or ft-1, ft-5 (ft-LAYERS)")
    given = params.get(kind) if isinstance(params, Mapping) else params
    own = PUBLISHED[kind] if given is None else method_of(PRESETS[kind]).params_of(given)
    return StudyMethod(name, int(number) if number else {"rome": 1, "memit": window}[kind], own)
