"""Hyper-parameters under their published names; they read the published JSON files."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

Params = TypeVar("Params", bound="LayerParams")

FACT_TOKENS = ("subject_last", "subject_first", "subject_first_after_last", "last")
# Keys of the published files that we read from the model itself, or that say where its moments came from.
_PUBLISHED_ONLY = (
    "rewrite_module_tmp",
    "layer_module_tmp",
    "mlp_module_tmp",
    "attn_module_tmp",
    "ln_f_module",
    "lm_head_module",
    "mom2_dataset",
    "mom2_n_samples",
    "mom2_dtype",
    "model_parallel",
)


@dataclass(frozen=True)
class LayerParams:
    """What the parameters of every method share. layers: edited layers, ascending."""

    layers: tuple[int, ...]

    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("layers is empty: say which layers to edit")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers {list(self.layers)}: expected different layers in ascending order")

    def _check(self, at_least_1: tuple[str, ...], above_0: tuple[str, ...]) -> None:
        for name in at_least_1:
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        for name in above_0:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a number above 0")

    @classmethod
    def from_dict(cls: type[Params], values: dict[str, Any]) -> Params:
        """From the keys of a published file. Raises ValueError that names unknown and missing keys."""
        own = {f.name for f in fields(cls)}
        unknown = [key for key in values if key not in own and key not in (*_PUBLISHED_ONLY, *cls._ignored())]
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(own))}")
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(f"{cls.__name__}: missing keys {', '.join(missing)}")
        return cls(**{key: value for key, value in values.items() if key in own})

    @classmethod
    def from_json(cls: type[Params], path: str | Path) -> Params:
        try:
            values = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"'{path}' is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"'{path}' holds no object of names and values")
        return cls.from_dict(values)

    @classmethod
    def preset(cls: type[Params], name: str) -> Params:
        """The settings for a model, by a name in `presets`: published ones, starting points for newer families (see
        docs/editing.md), and "world" for the built-in world."""
        if name not in cls.presets:
            raise ValueError(f"no {cls.__name__} preset '{name}': there are {', '.join(cls.presets)}")
        return cls(**cls.presets[name])

    @classmethod
    def _ignored(cls) -> tuple[str, ...]:
        return ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}


@dataclass(frozen=True)
class EditParams(LayerParams):
    """What ROME and MEMIT share.

    fact_token: whose key is edited. v_num_grad_steps, v_lr, v_weight_decay, kl_factor: the optimisation of a value
    (Adam; one step fewer is taken than evaluated). v_loss_layer: layer whose output gives the loss; None: the last.
    clamp_norm_factor: the change of a value stays within this factor of the value's norm.
    """

    fact_token: str = "subject_last"
    v_num_grad_steps: int = 20
    v_lr: float = 0.5
    v_loss_layer: int | None = None
    v_weight_decay: float = 0.5
    clamp_norm_factor: float = 4.0
    kl_factor: float = 0.0625
    mom2_adjustment: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fact_token not in FACT_TOKENS:
            raise ValueError(f"unknown fact_token '{self.fact_token}': expected one of {', '.join(FACT_TOKENS)}")
        self._check(at_least_1=("v_num_grad_steps",), above_0=("v_lr", "clamp_norm_factor"))
