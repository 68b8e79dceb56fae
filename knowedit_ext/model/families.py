"""Where each architecture keeps its embedding, decoder layers, attention, MLP and its projections, norm and head.

Supporting another Hugging Face decoder is one more line in `FAMILIES` (and a tiny random config in the tests).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .errors import UnsupportedModelError as UnsupportedModelError
from .wrappers import inside


@dataclass(frozen=True)
class Family:
    """Module paths of one architecture: `base` from the model, those from `attn` on from a layer.

    gate_projection: whose output (its first columns, as many as there are neurons) the activation function reads. This
    and up_projection are for the methods that ask for them (KN, MEND, KE); others do without.
    """

    base: str  # module that owns embedding, layers and final norm
    layers: str
    embedding: str
    final_norm: str
    attn: str
    mlp: str
    down_projection: str
    up_projection: str = ""
    gate_projection: str = ""


def _gpt(base: str, layers: str, embedding: str, norm: str, attn: str, down: str, up: str) -> Family:
    return Family(base, layers, embedding, norm, attn, "mlp", f"mlp.{down}", f"mlp.{up}", f"mlp.{up}")


def _llama_like(base: str = "model", up: str = "up_proj", gate: str = "gate_proj") -> Family:
    projections = ("mlp.down_proj", f"mlp.{up}", f"mlp.{gate}")
    return Family(base, "layers", "embed_tokens", "norm", "self_attn", "mlp", *projections)


FAMILIES: dict[str, Family] = {
    "gpt2": _gpt("transformer", "h", "wte", "ln_f", "attn", "c_proj", "c_fc"),
    "gptj": _gpt("transformer", "h", "wte", "ln_f", "attn", "fc_out", "fc_in"),
    "gpt_neox": _gpt(
        "gpt_neox", "layers", "embed_in", "final_layer_norm", "attention", "dense_4h_to_h", "dense_h_to_4h"
    ),
    "llama": _llama_like(),
    "mistral": _llama_like(),
    "qwen2": _llama_like(),
    "qwen3": _llama_like(),
    "phi3": _llama_like(up="gate_up_proj", gate="gate_up_proj"),
    "gemma2": _llama_like(),
    "gemma3_text": _llama_like(),
    "gemma3": _llama_like("model.language_model"),
    "olmo2": _llama_like(),
}

SITES = ("layer", "attn", "mlp")


class ModuleMap:
    """The parts of a loaded Hugging Face decoder, by what they do.

    Raises `UnsupportedModelError` for encoder-decoders, mixtures of experts and unknown architectures.
    """

    def __init__(self, hf: nn.Module) -> None:
        config = hf.config
        self.model_type = config.model_type
        refuse_unsupported(config)
        self.family = FAMILIES[self.model_type]
        self.config = config.get_text_config(decoder=True)
        self._hf = hf
        base = self._find(hf, self.family.base)
        self.embedding: nn.Module = self._find(base, self.family.embedding, self.family.base)
        self.final_norm: nn.Module = self._find(base, self.family.final_norm, self.family.base)
        self.layers: list[nn.Module] = [inside(x) for x in self._find(base, self.family.layers, self.family.base)]
        self.head: nn.Module = hf.get_output_embeddings()
        if self.head is None:
            raise UnsupportedModelError(
                f"{type(hf).__name__} has no language-model head: load the model with AutoModelForCausalLM"
            )
        for layer in self.layers:
            for part in ("attn", "mlp", "down_projection"):
                self._in_layer(layer, part)
        self._refuse_shared()

    def _refuse_shared(self) -> None:
        """An edit of one layer would change another, and a patch of one module would meet both."""
        for part in ("attn", "mlp", "down_projection"):
            first: dict[int, int] = {}
            for number, layer in enumerate(self.layers):
                before = first.setdefault(id(self._in_layer(layer, part)), number)
                if before != number:
                    raise UnsupportedModelError(
                        f"{type(self._hf).__name__}: layers {before} and {number} share one module ({part}), so one "
                        "cannot be patched or edited without the other"
                    )

    def _find(self, module: nn.Module, path: str, where: str = "") -> nn.Module:
        try:
            return inside(module.get_submodule(path))
        except AttributeError as error:
            place = f"{where}.{path}" if where else path
            raise UnsupportedModelError(
                f"{type(self._hf).__name__} (model_type '{self.model_type}') has no module '{place}', which its entry "
                "in knowedit_ext.model.families.FAMILIES names (a mixture-of-experts or custom block?)"
            ) from error

    def _in_layer(self, layer: nn.Module, part: str) -> nn.Module:
        return self._find(layer, self._path(part), f"{self.family.base}.{self.family.layers}.*")

    def _path(self, part: str) -> str:
        path = getattr(self.family, part)
        if not path:
            raise UnsupportedModelError(
                f"the entry of '{self.model_type}' in knowedit_ext.model.families.FAMILIES names no {part}"
            )
        return path

    def attn(self, layer: int) -> nn.Module:
        return inside(self.layers[layer].get_submodule(self.family.attn))

    def mlp(self, layer: int) -> nn.Module:
        return inside(self.layers[layer].get_submodule(self.family.mlp))

    def down_projection(self, layer: int) -> nn.Module:
        return inside(self.layers[layer].get_submodule(self.family.down_projection))

    def up_projection(self, layer: int) -> nn.Module:
        return self._in_layer(self.layers[layer], "up_projection")

    def gate_projection(self, layer: int) -> nn.Module:
        return self._in_layer(self.layers[layer], "gate_projection")

    def site(self, site: str, layer: int) -> nn.Module:
        """The module whose output is the site: "layer" (the residual stream after it), "attn" or "mlp"."""
        if site not in SITES:
            raise ValueError(f"unknown site '{site}': expected one of {', '.join(SITES)}")
        return self.layers[layer] if site == "layer" else getattr(self, site)(layer)

    def parameter_name(self, layer: int, part: str = "down_projection") -> str:
        """Full name of a layer's part, e.g. `transformer.h.3.mlp.c_proj`."""
        return f"{self.family.base}.{self.family.layers}.{layer}.{self._path(part)}"

    @property
    def max_positions(self) -> int | None:
        for name in ("n_positions", "max_position_embeddings"):
            if getattr(self.config, name, None):
                return int(getattr(self.config, name))
        return None


def refuse_unsupported(config) -> None:
    """Raise `UnsupportedModelError` for a config that is no dense decoder of a known family."""
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"'{name}' is an encoder-decoder; causal tracing and editing need a decoder-only model"
        )
    if name in FAMILIES:
        return
    text = config.get_text_config(decoder=True)
    experts = next(
        (a for a in ("num_local_experts", "num_experts", "n_routed_experts") if getattr(text, a, None)), None
    )
    if experts:
        raise UnsupportedModelError(
            f"'{name}' has mixture-of-experts blocks ({experts}={getattr(text, experts)}): a layer has no single down "
            "projection to trace or edit"
        )
    raise UnsupportedModelError(
        f"'{name}' is not supported: knowedit_ext.model.families.FAMILIES has no entry that says where it keeps "
        f"embedding, layers, attention, MLP, down projection and final norm. Supported: {', '.join(sorted(FAMILIES))}"
    )


def device_of(module: nn.Module) -> torch.device | None:
    """Where `module` computes; None where it holds no weights.

    Under accelerate the weights may be elsewhere than where they compute (memory, disk), and the hook that says so may
    sit on the module or only on its leaves.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return torch.device(device)
    parameter = next(module.parameters(), None)
    return None if parameter is None else parameter.device


def on_device(tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """`tensor` moved to where `module` computes (models spread over devices keep working layer by layer)."""
    device = device_of(module)
    return tensor if device is None else tensor.to(device)
