"""Hyper-parameters under their published names; they read the published JSON files."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
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


# Starting points for newer families, not published by the methods' authors: EasyEdit and AlphaEdit, hparams/.
_ROME_STARTS = dict(layers=(5,), v_num_grad_steps=25, v_weight_decay=1e-3)
_MEMIT_STARTS = dict(layers=(4, 5, 6, 7, 8), v_num_grad_steps=25, mom2_update_weight=15000.0)
_EASYEDIT_VALUES = dict(v_weight_decay=1e-3, clamp_norm_factor=4.0)


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
        "llama-2-7b": _ROME_STARTS,
        "llama-3-8b": _ROME_STARTS,
        "mistral-7b": _ROME_STARTS,
        "qwen2.5-7b": _ROME_STARTS,
        # The built-in world: its early site ends at layer 3, where the MLP adds little to the stream (|v| is small).
        # Subjects often begin a text there, where keys differ most: with few contexts the bare prompt weighs more.
        "world": dict(
            layers=(3,), clamp_norm_factor=16.0, v_weight_decay=0.05, context_template_length_params=((5, 2), (10, 2))
        ),
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
        "llama-2-7b": _MEMIT_STARTS | _EASYEDIT_VALUES,
        "llama-3-8b": _MEMIT_STARTS | dict(v_lr=0.1),  # AlphaEdit's
        "mistral-7b": _MEMIT_STARTS | _EASYEDIT_VALUES,
        "qwen2.5-7b": _MEMIT_STARTS | _EASYEDIT_VALUES,
        # The built-in world: small steps end nearer to where they began, which spares the neighbourhood.
        "world": dict(layers=(1, 2, 3), clamp_norm_factor=2.0, v_lr=0.2, v_num_grad_steps=40, mom2_update_weight=400.0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_selection != "all":
            raise ValueError(f"layer_selection '{self.layer_selection}': only 'all' is supported")
        self._check(at_least_1=(), above_0=("mom2_update_weight",))

    @classmethod
    def _ignored(cls) -> tuple[str, ...]:
        return ("context_template_length_params",)


@dataclass(frozen=True)
class FTParams(LayerParams):
    """Fine-tuning: FT, FT+L (with `norm_constraint`) and FT-W (with `wd_power_law`).

    num_steps: epochs, of batches of `batch_size` requests. lr, weight_decay: of Adam. norm_constraint: no entry of a
    weight moves farther than this; None (or false): no bound. wd_power_law: (a, b), the weight decay for n requests is
    then n^a e^b. kl_factor: read by no release; 0. rewrite_module_tmp: name of the trained module with `{}` for the
    layer; None: the down projection. bias: train biases too, as the published code always does.
    """

    num_steps: int = 25
    lr: float = 5e-4
    weight_decay: float = 0.0
    norm_constraint: float | None = None
    batch_size: int = 64
    wd_power_law: tuple[float, float] | None = None
    kl_factor: float = 0.0
    rewrite_module_tmp: str | None = None
    bias: bool = False

    # hparams/FT/*.json of rome and memit: FT under the model's name, its variants behind a slash.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-medium/ft-l": dict(layers=(0,), norm_constraint=2e-3),
        "gpt2-large/ft-l": dict(layers=(0,), norm_constraint=1e-3),
        "gpt2-xl": dict(layers=(1,)),
        "gpt2-xl/ft-l": dict(layers=(0,), norm_constraint=5e-4),
        "gpt2-xl/attn": dict(
            layers=(33,), lr=1e-3, norm_constraint=1e-3, rewrite_module_tmp="transformer.h.{}.attn.c_attn"
        ),
        "gpt-j": dict(layers=(21,)),
        "gpt-j/ft-l": dict(layers=(0,), norm_constraint=5e-5),
        "gpt-j/ft-w": dict(layers=(21,), wd_power_law=(-0.87028798, 0.15589562), rewrite_module_tmp="transformer.h.{}"),
        # The built-in world: a narrow model, whose weights are larger and must move farther.
        "world": dict(layers=(1,), lr=3e-3, num_steps=50),
        "world/ft-l": dict(layers=(0,), lr=2e-3, norm_constraint=6e-3),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(at_least_1=("num_steps", "batch_size"), above_0=("lr",))
        if self.norm_constraint is False:  # the files' way to say that there is none
            object.__setattr__(self, "norm_constraint", None)
        if self.norm_constraint is not None:
            self._check(at_least_1=(), above_0=("norm_constraint",))
        object.__setattr__(self, "weight_decay", float(self.weight_decay))  # false in some files
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay}: expected 0 or more")
        if self.wd_power_law is not None:
            law = tuple(float(number) for number in self.wd_power_law)
            if len(law) != 2 or not all(map(math.isfinite, law)):
                raise ValueError(f"wd_power_law is {list(law)}: expected [a, b] for a weight decay of n^a e^b")
            object.__setattr__(self, "wd_power_law", law)
        if self.rewrite_module_tmp is not None and self.rewrite_module_tmp.count("{}") != 1:
            raise ValueError(
                f"rewrite_module_tmp '{self.rewrite_module_tmp}': exactly one '{{}}' must say where the layer goes"
            )

    @classmethod
    def _ignored(cls) -> tuple[str, ...]:
        return ("max_length",)
