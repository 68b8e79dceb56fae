"""Hyper-parameters under their published names; they read the published files, JSON and YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from reprlib import repr as brief
from typing import Any, ClassVar, Literal, TypeVar, get_args

from ..checks import Count, Natural, NotNegative, Positive, as_type, one_of, quoted, read_fields
from ..documents import read_json, read_yaml

Params = TypeVar("Params", bound="LayerParams")
FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]
FACT_TOKENS = get_args(FactToken)

# Keys of published files (rome, memit, AlphaEdit, EasyEdit) that say nothing about the edit: what we read from the
# model itself, where its moments came from, how and where the model is loaded.
_PUBLISHED_ONLY = frozenset(
    """rewrite_module_tmp layer_module_tmp mlp_module_tmp attn_module_tmp ln_f_module lm_head_module
    mom2_dataset mom2_n_samples mom2_dtype stats_dir
    model_name device model_parallel fp16 batch_size max_length""".split()
)


@dataclass(frozen=True)
class LayerParams:
    """What the parameters of every method share. layers: edited layers, ascending.

    Every value is read by its annotation (see `checks.as_type`): "5e-1" is 0.5, `layers=3` is (3,).
    """

    layers: tuple[Natural, ...]

    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    algorithms: ClassVar[tuple[str, ...]] = ()  # what `alg_name` may be in a published file of these parameters
    other: ClassVar[frozenset[str]] = frozenset()  # keys of its published files that it has no use for
    all_layers: ClassVar[bool] = False  # whether no layers means all of them
    fixed: ClassVar[dict[str, Any]] = {}  # keys of its published files that must have this value

    def __post_init__(self) -> None:
        read_fields(self, spelled=True)
        if not self.layers and not self.all_layers:
            raise ValueError("layers is empty: say which layers to edit")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers {list(self.layers)}: expected different layers in ascending order")

    @classmethod
    def from_dict(cls: type[Params], values: Mapping[str, Any]) -> Params:
        """From the keys of a published file. Raises ValueError that names unknown and missing keys."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{cls.__name__}: {brief(values)} is no object of names and values")
        own = {f.name for f in fields(cls)}
        known = own | _PUBLISHED_ONLY | cls.other | cls.fixed.keys() | {"alg_name"}
        if unknown := [str(key) for key in values if key not in known]:
            raise ValueError(f"{cls.__name__}: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(own))}")
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]:
            raise ValueError(f"{cls.__name__}: missing keys {', '.join(missing)}")
        if "alg_name" in values and cls.algorithms:
            one_of("alg_name", values["alg_name"], cls.algorithms)
        for key, only in cls.fixed.items():
            if as_type(key, values.get(key, only), type(only)) != only:
                raise ValueError(f"{key} is {brief(values[key])}: only {only} is supported")
        return cls(**{key: value for key, value in values.items() if key in own})

    @classmethod
    def from_file(cls: type[Params], path: str | Path) -> Params:
        """From a published file, .json, .yaml or .yml. Raises ValueError that names it and what is wrong in it."""
        path = Path(path)
        read = {".json": cls.from_json, ".yaml": cls.from_yaml, ".yml": cls.from_yaml}.get(path.suffix.lower())
        if read is None:
            raise ValueError(f"'{path}' is no file of parameters: expected .json, .yaml or .yml")
        return read(path)

    @classmethod
    def from_json(cls: type[Params], path: str | Path) -> Params:
        return cls._from_content(path, read_json(path))

    @classmethod
    def from_yaml(cls: type[Params], path: str | Path) -> Params:
        return cls._from_content(path, read_yaml(path))

    @classmethod
    def _from_content(cls: type[Params], path: str | Path, content: Any) -> Params:
        if not isinstance(content, dict):
            raise ValueError(f"'{path}' holds no object of names and values")
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from error

    @classmethod
    def preset(cls: type[Params], name: str) -> Params:
        """The settings for a model, by a name in `presets`: published ones, starting points for newer families (see
        docs/editing.md), and "world" for the built-in world."""
        if name not in cls.presets:
            raise ValueError(f"no {cls.__name__} preset {quoted(name)}: there are {', '.join(cls.presets)}")
        return cls(**cls.presets[name])

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}


@dataclass(frozen=True)
class EditParams(LayerParams):
    """What ROME and MEMIT share.

    fact_token: whose key is edited. v_num_grad_steps, v_lr, v_weight_decay, kl_factor: the optimisation of a value
    (Adam; one step fewer is taken than evaluated). v_loss_layer: layer whose output gives the loss; None: the last.
    clamp_norm_factor: the change of a value stays within this factor of the value's norm. update_norm_lambda: mu, added
    to the diagonal of lambda C (ENCORE): the larger, the smaller the changes. norm_anchor: norm of what the MLP is to
    put out (NAS), see `anchor.value_norm`; None: as optimised.
    """

    fact_token: FactToken = "subject_last"
    v_num_grad_steps: Count = 20
    v_lr: Positive = 0.5
    v_loss_layer: int | None = None
    v_weight_decay: NotNegative = 0.5
    clamp_norm_factor: Positive = 4.0
    kl_factor: NotNegative = 0.0625
    mom2_adjustment: bool = True
    update_norm_lambda: NotNegative = 0.0
    norm_anchor: Positive | None = None

    #: what decides a value, beside the last layer
    in_values: ClassVar[tuple[str, ...]] = (
        "fact_token",
        "v_num_grad_steps",
        "v_lr",
        "v_loss_layer",
        "v_weight_decay",
        "clamp_norm_factor",
        "kl_factor",
        "norm_anchor",
    )

    def of_values(self: Params) -> Params:
        """The last layer and what decides its values, the rest at its defaults: equal where values are."""
        return type(self)(self.layers[-1:], **{name: getattr(self, name) for name in self.in_values})

    def describe_values(self) -> dict[str, Any]:
        """JSON, alike for all methods whose values these are."""
        return {"layer": self.layers[-1], **{name: getattr(self, name) for name in self.in_values}}
