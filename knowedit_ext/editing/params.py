"""Hyper-parameters under their published names; they read the published JSON files."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

Params = TypeVar("Params", bound="EditParams")

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
class EditParams:
    """What ROME and MEMIT share.

    layers: edited layers. fact_token: whose key is edited. v_num_grad_steps, v_lr, v_weight_decay, kl_factor: the
    optimisation of a value (Adam; one step fewer is taken than evaluated). v_loss_layer: layer whose output gives the
    loss; None: the last. clamp_norm_factor: the change of a value stays within this factor of the value's norm.
    """

    layers: tuple[int, ...]
    fact_token: str = "subject_last"
    v_num_grad_steps: int = 20
    v_lr: float = 0.5
    v_loss_layer: int | None = None
    v_weight_decay: float = 0.5
    clamp_norm_factor: float = 4.0
    kl_factor: float = 0.0625
    mom2_adjustment: bool = True

    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("layers is empty: say which layers to edit")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers {list(self.layers)}: expected different layers in ascending order")
        if self.fact_token not in FACT_TOKENS:
            raise ValueError(f"unknown fact_token '{self.fact_token}': expected one of {', '.join(FACT_TOKENS)}")
        for name in ("v_num_grad_steps",):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        for name in ("v_lr", "clamp_norm_factor"):
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
        """The settings for a model, by a name in `presets`: published ones, and "world" for the built-in world."""
        if name not in cls.presets:
            raise ValueError(f"no {cls.__name__} preset '{name}': there are {', '.join(cls.presets)}")
        return cls(**cls.presets[name])

    @classmethod
    def _ignored(cls) -> tuple[str, ...]:
        return ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}


@dataclass(frozen=True)
class ROMEParams(EditParams):
    """context_template_length_params: [length, how many] of the generated contexts, beside the bare prompt."""

    context_template_length_params: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = tuple((int(length), int(count)) for length, count in self.context_template_length_params)
        object.__setattr__(self, "context_template_length_params", lengths)

    # rome, hparams/ROME/*.json
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-medium": dict(layers=(8,), clamp_norm_factor=3.0),
        "gpt2-large": dict(layers=(12,)),
        "gpt2-xl": dict(layers=(17,)),
        "gpt-j": dict(layers=(5,)),
        "gpt-neox": dict(layers=(15,)),
        # The built-in world: its early site ends at layer 3, where the MLP adds little to the stream (|v| is small).
        "world": dict(layers=(3,), clamp_norm_factor=16.0, v_weight_decay=0.05),
    }

    @classmethod
    def _ignored(cls) -> tuple[str, ...]:
        return ("layer_selection", "mom2_update_weight")


@dataclass(frozen=True)
class MEMITParams(EditParams):
    """mom2_update_weight: lambda, how much the keys the model knows weigh against the new ones."""

    clamp_norm_factor: float = 0.75
    mom2_update_weight: float = 15000.0
    layer_selection: str = field(default="all", repr=False)

    # memit, hparams/MEMIT/*.json; NeoX: MEMIT, appendix
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-xl": dict(layers=(13, 14, 15, 16, 17), mom2_update_weight=20000.0),
        "gpt-j": dict(layers=(3, 4, 5, 6, 7, 8), v_num_grad_steps=25, mom2_update_weight=15000.0),
        "gpt-neox": dict(layers=(6, 7, 8, 9, 10), clamp_norm_factor=0.3, mom2_update_weight=20000.0),
        # The built-in world: small steps end nearer to where they began, which spares the neighbourhood.
        "world": dict(layers=(1, 2, 3), clamp_norm_factor=2.0, v_lr=0.2, v_num_grad_steps=40, mom2_update_weight=200.0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_selection != "all":
            raise ValueError(f"layer_selection '{self.layer_selection}': only 'all' is supported")
        if not self.mom2_update_weight > 0:
            raise ValueError(f"mom2_update_weight is {self.mom2_update_weight}: expected a number above 0")

    @classmethod
    def _ignored(cls) -> tuple[str, ...]:
        return ("context_template_length_params",)
