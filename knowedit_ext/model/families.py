"""Where each architecture keeps its embedding, decoder layers, attention, MLP and its projections, norm and head.

Supporting another Hugging Face decoder is one more line in `FAMILIES` (and a tiny random config in the tests). A
container (of text and images, ...) needs none where its text part has one.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedModelError as UnsupportedModelError
from .wrappers import TRANSPARENT, inside


@dataclass(frozen=True)
class Family:
    """Module paths of one architecture: `base` from the model, those from `attn` on from a layer.

    attn, mlp: of several names, separated by spaces, a layer has one. down_projection: empty for mixtures of experts,
    which are traced and evaluated, not edited.
    gate_projection: whose output (its first columns, as many as there are neurons) the activation function reads. This
    and up_projection are for the methods that ask for them (KN, MEND, KE); others do without.
    """

    base: str  # module that owns embedding, layers and final norm; in a container it is looked for
    layers: str
    embedding: str
    final_norm: str
    attn: str
    mlp: str
    down_projection: str = ""
    up_projection: str = ""
    gate_projection: str = ""
    mlp_norm: str = ""  # behind the MLP, before its output is added
    without: tuple[str, ...] = ()  # sites that no module's output is
    whole: bool = False  # attends in a way that only whole sequences can, though by AttentionInterface

    @property
    def edited(self) -> bool:
        return bool(self.down_projection) or "mlp" in self.without


def _gpt(base: str, layers: str, embedding: str, norm: str, attn: str, down: str, up: str) -> Family:
    return Family(base, layers, embedding, norm, attn, "mlp", f"mlp.{down}", f"mlp.{up}", f"mlp.{up}")


def _llama_like(
    up: str = "up_proj",
    gate: str = "gate_proj",
    down: str = "down_proj",
    norm: str = "norm",
    mlp_norm: str = "",
) -> Family:
    projections = (f"mlp.{down}", f"mlp.{up}", f"mlp.{gate}")
    return Family("model", "layers", "embed_tokens", norm, "self_attn", "mlp", *projections, mlp_norm)


def _post_norm(mlp_norm: str = "post_feedforward_layernorm") -> Family:
    return _llama_like(mlp_norm=mlp_norm)


def _fused() -> Family:
    return _llama_like(up="gate_up_proj", gate="gate_up_proj")


def _ungated(up: str, down: str, norm: str = "norm") -> Family:
    return _llama_like(up=up, gate=up, down=down, norm=norm)


def _experts(mlp: str = "mlp", attn: str = "self_attn", without: tuple[str, ...] = ()) -> Family:
    return Family("model", "layers", "embed_tokens", "norm", attn, mlp, without=without)


def _short_conv(mlp_norm: str = "") -> Family:
    projections = ("feed_forward.w2", "feed_forward.w3", "feed_forward.w1")
    mixers, mlp = "self_attn conv", "feed_forward"
    return Family("model", "layers", "embed_tokens", "embedding_norm", mixers, mlp, *projections, mlp_norm)


FAMILIES: dict[str, Family] = {
    "gpt2": _gpt("transformer", "h", "wte", "ln_f", "attn", "c_proj", "c_fc"),
    "gpt_bigcode": _gpt("transformer", "h", "wte", "ln_f", "attn", "c_proj", "c_fc"),
    "gpt_neo": _gpt("transformer", "h", "wte", "ln_f", "attn.attention", "c_proj", "c_fc"),
    "gptj": _gpt("transformer", "h", "wte", "ln_f", "attn", "fc_out", "fc_in"),
    "codegen": _gpt("transformer", "h", "wte", "ln_f", "attn", "fc_out", "fc_in"),
    "gpt_neox": _gpt(
        "gpt_neox", "layers", "embed_in", "final_layer_norm", "attention", "dense_4h_to_h", "dense_h_to_4h"
    ),
    "opt": Family(
        "model.decoder", "layers", "embed_tokens", "final_layer_norm", "self_attn", "fc2", "fc2", "fc1", "fc1"
    ),
    "biogpt": Family("biogpt", "layers", "embed_tokens", "layer_norm", "self_attn", "fc2", "fc2", "fc1", "fc1"),
    **dict.fromkeys(
        (
            "llama mistral qwen2 qwen3 gemma olmo stablelm smollm3 "
            "ministral ministral3 seed_oss ernie4_5 hunyuan_v1_dense helium vaultgemma internlm3 cwm bitnet "
            "cohere cohere2 granite granite_swa minicpm3 youtu qwen2_vl_text qwen2_5_vl_text "
            "qwen3_vl_text exaone iquestcoder"
        ).split(),
        _llama_like(),
    ),
    **dict.fromkeys("gemma2 gemma3_text gemma4_text olmo2 olmo3 exaone4".split(), _post_norm()),
    "hyperclovax": _post_norm(mlp_norm="post_norm2"),
    **dict.fromkeys(("glm4", "glm4v_text"), dataclasses.replace(_fused(), mlp_norm="post_mlp_layernorm")),
    "arcee": _ungated("up_proj", "down_proj"),
    "apertus": _ungated("up_proj", "down_proj"),
    "apertus1p5_text": _ungated("up_proj", "down_proj"),
    "nemotron": _ungated("up_proj", "down_proj"),
    "jais2": _ungated("up_proj", "down_proj"),
    "starcoder2": _ungated("c_fc", "c_proj"),
    "nanochat": _ungated("fc1", "fc2"),
    "phi": _ungated("fc1", "fc2", norm="final_layernorm"),
    "persimmon": _ungated("dense_h_to_4h", "dense_4h_to_h", norm="final_layernorm"),
    **dict.fromkeys(("phi3", "glm"), _fused()),
    **dict.fromkeys(
        (
            "mixtral qwen2_moe qwen3_moe olmoe deepseek_v2 deepseek_v3 gpt_oss glm4_moe phimoe ernie4_5_moe dots1 "
            "hunyuan_v1_moe flex_olmo exaone_moe afmoe axk1 cohere2_moe flint glm4_moe_lite hy_v3 kolibri1 laguna "
            "mellum mimo_v2_flash minimax minimax_m2 solar_open sarvam_moe sarvam_mla qwen3_vl_moe_text aria_text "
            "kimi_linear"
        ).split(),
        _experts(),
    ),
    "bloom": Family(
        "transformer",
        "h",
        "word_embeddings",
        "ln_f",
        "self_attention",
        "mlp.dense_4h_to_h",
        "mlp.dense_4h_to_h",
        "mlp.dense_h_to_4h",
        "mlp.dense_h_to_4h",
        without=("attn",),
    ),
    "falcon": Family(
        "transformer",
        "h",
        "word_embeddings",
        "ln_f",
        "self_attention",
        "mlp",
        "mlp.dense_4h_to_h",
        "mlp.dense_h_to_4h",
        "mlp.dense_h_to_4h",
    ),
    "mpt": Family(
        "transformer", "blocks", "wte", "norm_f", "attn", "ffn.down_proj", "ffn.down_proj", "ffn.up_proj", "ffn.up_proj"
    ),
    **dict.fromkeys(("diffllama", "doge"), dataclasses.replace(_llama_like(), whole=True)),
    "qwen3_5_text": dataclasses.replace(_llama_like(), attn="self_attn linear_attn"),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text", "lara_mini"), _experts(attn="self_attn linear_attn")),
    "olmo_hybrid": dataclasses.replace(_llama_like(), attn="self_attn linear_attn"),
    "lfm2_moe": Family("model", "layers", "embed_tokens", "embedding_norm", "self_attn conv", "feed_forward"),
    "lfm2": _short_conv(),
    "lfm3": _short_conv(mlp_norm="post_ffn_norm"),
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba"),
        Family("backbone", "layers", "embeddings", "norm_f", "mixer", "", without=("mlp",)),
    ),
    # A layer is one mixer: a state space, attention, an MLP or experts.
    "nemotron_h": Family("model", "layers", "embeddings", "norm_f", "mixer", "", without=("mlp",)),
    "granitemoe": _experts(mlp="block_sparse_moe"),
    # Two modules add to the residual stream side by side.
    **dict.fromkeys(("granitemoeshared", "granitemoe_swa"), _experts(mlp="", without=("mlp",))),
    "granitemoehybrid": _experts(mlp="", attn="self_attn mamba", without=("mlp",)),
    "jetmoe": _experts(attn="self_attention"),
    "jamba": Family("model", "layers", "embed_tokens", "final_layernorm", "self_attn mamba", "feed_forward"),
    "bamba": Family(
        "model",
        "layers",
        "embed_tokens",
        "final_layernorm",
        "self_attn mamba",
        "feed_forward",
        "feed_forward.down_proj",
        "feed_forward.up_proj",
        "feed_forward.gate_proj",
    ),
    # Its scale grows with the row's number, and it attends in chunks.
    "llama4_text": dataclasses.replace(_experts(mlp="feed_forward"), whole=True),
}

SITES = ("layer", "attn", "mlp")


class ModuleMap:
    """The parts of a loaded Hugging Face decoder, by what they do.

    Raises `UnsupportedModelError` for encoder-decoders and unknown architectures.
    """

    def __init__(self, hf: nn.Module) -> None:
        config = hf.config
        self.model_type = config.model_type
        refuse_unsupported(config)
        self.config = config.get_text_config(decoder=True)
        self.family = FAMILIES.get(self.model_type) or _contained(hf, self.config)
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
        owners = (type(module) for module in hf.modules() if self.head in module._modules.values())
        # Names in the forward of the whole, and of what the head is in: what is done around it, see `LogitForm`.
        self.head_reads = frozenset(
            name for owner in (type(hf), *owners) for name in inspect.unwrap(owner.forward).__code__.co_names
        )
        for layer in self.layers:
            for part in ("attn", "mlp", "down_projection"):
                if getattr(self.family, part):
                    self._in_layer(layer, part)
        self._refuse_shared()

    def _refuse_shared(self) -> None:
        """An edit of one layer would change another, and a patch of one module would meet both."""
        for part in filter(lambda part: getattr(self.family, part), ("attn", "mlp", "down_projection")):
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
        return self._find(layer, self._path(part, layer), f"{self.family.base}.{self.family.layers}.*")

    def _path(self, part: str, layer: nn.Module) -> str:
        path = getattr(self.family, part)
        if path:
            names = path.split()
            return next((name for name in names if getattr(layer, name.split(".")[0], None) is not None), names[0])
        if part == "down_projection" and not self.family.edited:
            raise UnsupportedModelError(
                f"'{self.model_type}' has mixture-of-experts blocks: no single down projection that could be edited "
                "or give keys; tracing and evaluation work"
            )
        raise UnsupportedModelError(
            f"the entry of '{self.model_type}' in knowedit_ext.model.families.FAMILIES names no {part}"
        )

    def attn(self, layer: int) -> nn.Module:
        return self._in_layer(self.layers[layer], "attn")

    def reads_keys(self, layer: int) -> bool:
        """Whether its attention takes keys and values from an earlier layer (Gemma 4 E2B and E4B)."""
        return getattr(self.attn(layer), "is_kv_shared_layer", False)

    def mlp(self, layer: int) -> nn.Module:
        return self._in_layer(self.layers[layer], "mlp")

    def down_projection(self, layer: int) -> nn.Module:
        return self._in_layer(self.layers[layer], "down_projection")

    def mlp_norm(self, layer: int) -> nn.Module | None:
        norm = self._in_layer(self.layers[layer], "mlp_norm") if self.family.mlp_norm else None
        return None if isinstance(norm, nn.Identity) else norm

    def up_projection(self, layer: int) -> nn.Module:
        return self._in_layer(self.layers[layer], "up_projection")

    def gate_projection(self, layer: int) -> nn.Module:
        return self._in_layer(self.layers[layer], "gate_projection")

    def site(self, site: str, layer: int) -> nn.Module:
        """The module whose output is the site: "layer" (the residual stream after it), "attn" or "mlp"."""
        if site not in SITES:
            raise ValueError(f"unknown site '{site}': expected one of {', '.join(SITES)}")
        if site in self.family.without:
            raise UnsupportedModelError(
                f"no module of '{self.model_type}' puts out what its {site} adds to the residual stream by itself"
            )
        return self.layers[layer] if site == "layer" else getattr(self, site)(layer)

    def parameter_name(self, layer: int, part: str = "down_projection") -> str:
        """Full name of a layer's part, e.g. `transformer.h.3.mlp.c_proj`."""
        return f"{self.family.base}.{self.family.layers}.{layer}.{self._path(part, self.layers[layer])}"

    @property
    def max_positions(self) -> int | None:
        names = ("n_positions", "max_position_embeddings", "max_seq_len")
        return min(
            (int(getattr(self.config, name)) for name in names if getattr(self.config, name, None)), default=None
        )


def _contained(hf: nn.Module, text: Any) -> Family:
    """The family of a container's text part, with where the container keeps it. text: that part's config."""
    family = FAMILIES[text.model_type]
    owns = family.layers.split(".")[0]
    for name, module in hf.named_modules():
        if getattr(getattr(module, "config", None), "model_type", None) == text.model_type and hasattr(module, owns):
            own = [part for part in name.split(".") if part not in TRANSPARENT]
            return dataclasses.replace(family, base=".".join(own))
    raise UnsupportedModelError(
        f"{type(hf).__name__} (model_type '{hf.config.model_type}') has no module with the '{owns}' of a "
        f"'{text.model_type}', which its config says it holds"
    )


def refuse_unsupported(config) -> None:
    """Raise `UnsupportedModelError` for a config that is neither a decoder of a known family nor holds one."""
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"'{name}' is an encoder-decoder; causal tracing and editing need a decoder-only model"
        )
    try:
        text = config.get_text_config(decoder=True).model_type
    except ValueError as error:  # several
        raise UnsupportedModelError(f"'{name}' is no single decoder: {error}") from error
    if name in FAMILIES or text in FAMILIES:
        return
    held = f" (its text part is a '{text}')" if text != name else ""
    raise UnsupportedModelError(
        f"'{name}'{held} is not supported: knowedit_ext.model.families.FAMILIES has no entry that says where it keeps "
        f"embedding, layers, attention, MLP, down projection and final norm. Supported, alone and as the text part of "
        f"another model: {', '.join(sorted(FAMILIES))}"
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
