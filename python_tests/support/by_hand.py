"""A line by hand for every causal language model of the installed transformers that is not in FAMILIES: is what it
gives right, or refused? Nothing may be silently wrong.

    python -m python_tests.support.by_hand [model_type[@seed] ...]     (from the repository; minutes for all of them)

The line is guessed from the module's names as a newcomer would, without and then with `whole=True`; the model is tiny
and random, its norms and biases off their neutral values, windows and choices of keys narrower than the prompts.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import knowedit_ext as ke
from knowedit_ext.evaluation.nll import score
from knowedit_ext.model.families import FAMILIES, Family
from knowedit_ext.model.pretrained import auto_class

from ..evaluation.test_nll import plain, some_questions
from ..tracing.test_against_the_loop import FACTS, IDS, NOISE, noisy
from . import oracle
from .families import HEADS, LAYERS, POSITIONS, VOCAB, WIDTH, spread_weights
from .tokenizers import word_level

# Of these a config gets what it has. Names are those of all families.
_SIZES = {
    **dict.fromkeys("hidden_size d_model n_embd embed_dim emb_dim attention_hidden_size lru_width".split(), WIDTH),
    **dict.fromkeys(
        "intermediate_size ffn_dim n_inner dff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size".split(), 48
    ),
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_blocks num_decoder_layers".split(), LAYERS
    ),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads attention_heads decoder_attention_heads encoder_attention_heads "
        "num_heads".split(),
        HEADS,
    ),
    **dict.fromkeys("max_position_embeddings n_positions context_length".split(), POSITIONS),
    **dict.fromkeys("vocab_size vocab_size_per_layer_input".split(), VOCAB),
    **dict.fromkeys("sliding_window attention_window_size index_topk conv_kernel linear_conv_kernel_dim".split(), 3),
    **dict.fromkeys(
        "num_experts n_routed_experts num_local_experts ssm_state_size state_size mamba_d_state".split(), 4
    ),
    **dict.fromkeys("n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace".split(), 1),
    **dict.fromkeys("n_groups mamba_n_groups encoder_layers zero_expert_num".split(), 1),
    **dict.fromkeys("index_block_size index_topk_blocks".split(), 2),
    **dict.fromkeys("num_key_value_heads num_experts_per_tok moe_topk index_n_heads linear_num_key_heads".split(), 2),
    **dict.fromkeys("head_dim global_head_dim kv_lora_rank q_lora_rank qk_nope_head_dim v_head_dim".split(), 8),
    **dict.fromkeys("index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim".split(), 8),
    **dict.fromkeys("mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim hidden_size_per_layer_input".split(), 8),
    **dict.fromkeys("moe_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size".split(), 16),
    **dict.fromkeys("dropout attention_dropout activation_dropout layerdrop".split(), 0.0),
    **dict(shared_expert_intermediate_size=16, mamba_d_ssm=64, qk_rope_head_dim=4, linear_num_value_heads=4),
    **dict(linear_num_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0, is_decoder=True, num_kv_shared_layers=0),
}
_LATENT = dict(num_key_value_heads=HEADS)
_OWN = {
    **dict.fromkeys("deepseek_v32 glm_moe_dsa axk2 kimi_linear dots3_note_text".split(), _LATENT),
    "nemotron_h": dict(layers_block_type=["linear_attention", "mlp", "full_attention", "moe"]),
    "gemma3n_text": dict(laurel_rank=4, activation_sparsity_pattern=[0.0] * LAYERS, intermediate_size=[48] * LAYERS),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2),
    ),
    "cohere_compass_text": dict(rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e4))),
    "zaya": dict(num_experts_per_tok=1),
    "xlm": dict(causal=True),
    "falcon_h1": dict(lm_head_multiplier=0.7, embedding_multiplier=1.3, key_multiplier=0.8, ssm_out_multiplier=0.8),
}
_MIXERS = (
    "self_attn linear_attn attn attention self_attention mixer mamba temporal_block conv mlstm_layer attention_layer"
).split()
_MLPS = "mlp feed_forward block_sparse_moe ffn moe mlp_block fc2 ffn_layer output channel_mixing moe_block".split()
_QUESTIONS = 2


@dataclass(frozen=True)
class Verdict:
    said: str  # "right", "refused", "WRONG" or "failed" (an error that is no refusal)
    why: str


def unlisted() -> list[str]:
    """But for containers of what is listed or tried by itself."""
    every = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return sorted(name for name in every - {*FAMILIES} if _text_part(name) not in {*FAMILIES, *every} - {name})


def _text_part(model_type: str) -> str:
    try:
        return CONFIG_MAPPING[model_type]().get_text_config(decoder=True).model_type
    except Exception:  # needs parts to be named
        return model_type


def tiny(model_type: str, seed: int = 0) -> PreTrainedModel:
    make = CONFIG_MAPPING[model_type]
    try:
        usual = make()
    except Exception:  # needs parts to be named
        usual = make
    names = {*dir(usual), *getattr(make, "__dataclass_fields__", ())}
    given = {name: value for name, value in _SIZES.items() if name in names} | _OWN.get(model_type, {})
    kinds = sorted(set(getattr(usual, "layer_types", None) or ()))
    if kinds and not isinstance(getattr(make, getattr(usual, "attribute_map", {}).get("layer_types", ""), 0), property):
        given.setdefault("layer_types", (kinds * LAYERS)[:LAYERS])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = make(**given)
        hf = auto_class(config).from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, p in hf.named_parameters():
                if p.dim() == 1 and "A_log" not in name and "dt_bias" not in name:
                    p.add_(0.3 * torch.randn_like(p))
    return spread_weights(hf, 12.0)


def guessed(hf: PreTrainedModel) -> Family:
    """The line that the names of the modules suggest; the final norm is what the head reads."""
    count = getattr(hf.config.get_text_config(decoder=True), "num_hidden_layers", LAYERS)
    lists = {n: m for n, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1 and "expert" not in n}
    lists = {name: m for name, m in lists.items() if len(m) == count} or lists
    layers = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))

    def first_names(known: list[str]) -> list[str | None]:
        return [next((x for x in known if getattr(layer, x, None) is not None), None) for layer in lists[layers]]

    mlps = first_names(_MLPS)
    every = dict(base="", layers=layers, embedding=_path(hf, hf.get_input_embeddings()), final_norm=_final(hf, layers))
    attn = " ".join(dict.fromkeys(x for x in first_names(_MIXERS) if x))
    if None in mlps:
        return Family(**every, attn=attn, mlp="", without=("mlp",))
    return Family(**every, attn=attn, mlp=" ".join(dict.fromkeys(x for x in mlps if x)))


def _path(hf: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in hf.named_modules() if each is module)


def _final(hf: PreTrainedModel, layers: str) -> str:
    """The module outside of the layers whose output the head reads, or the last one called a norm."""
    read: list[torch.Tensor] = []
    said: list[tuple[str, torch.Tensor]] = []

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, out: object) -> None:
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, torch.Tensor):
                said.append((name, first))

        return hook

    outside = [x for x in hf.named_modules() if x[0] and not f"{x[0]}.".startswith(f"{layers}.")]
    outside = [(name, module) for name, module in outside if not layers.startswith(f"{name}.")]
    handles = [module.register_forward_hook(keep(name)) for name, module in outside]
    head = hf.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(lambda module, args: read.append(args[0])))
    with torch.no_grad():
        hf(torch.tensor([[5, 6, 7]]), use_cache=False)
    for handle in handles:
        handle.remove()
    same = [name for name, out in said if out.shape == read[0].shape and torch.equal(out, read[0])]
    return (same or [name for name, _ in said if "norm" in name.lower() or "ln" in name.lower()])[-1]


def verdict(hf: PreTrainedModel, family: Family) -> Verdict:
    """Of traces and scores under that line, beside plain loops. What is refused is only not wrong."""
    kinds = {hf.config.model_type, hf.config.get_text_config(decoder=True).model_type} - {*FAMILIES}
    FAMILIES.update(dict.fromkeys(kinds, family))
    try:
        model = ke.load_model((hf, word_level(VOCAB)))
        return max(_compared(model), key=lambda each: each[0])[1]
    except ValueError as error:
        return Verdict("refused", str(error))
    except Exception as error:
        return Verdict("failed", f"{type(error).__name__}: {error}")
    finally:
        for kind in kinds:
            del FAMILIES[kind]


def _compared(model: ke.EditableModel) -> Iterator[tuple[float, Verdict]]:
    """(how far off, what that is)."""

    def of(off: float, what: str) -> tuple[float, Verdict]:
        off = float("inf") if off != off else off
        return off, Verdict("right" if off <= 1e-5 else "WRONG", f"{off:.0e} ({what})")

    both = None if "mlp" in model.modules.family.without else "mlp"
    for number, kind, sever in ((0, "state", None), (0, "attn", both), (1, "mlp", None)):
        if kind in model.modules.family.without:
            continue
        got = ke.trace(model, FACTS[number], kind=kind, window=2, sever=sever, samples=2, noise=NOISE)
        start = noisy(number, got.answer_ids, samples=2)
        with _sites_of(model):
            want = oracle.plain_trace(model.hf, IDS[number], start, got.answer_ids, kind, 2, sever)
        yield of(float(np.abs(got.scores - want.scores).max()), f"trace of {kind}")
    questions = some_questions(_QUESTIONS)
    wanted = [nll for question in questions for nll, _ in plain(model, question)]
    ours = [each.nll for scores in score(model, questions)[0] for each in scores]
    yield of(max(abs(x - y) / max(1.0, abs(y)) for x, y in zip(ours, wanted, strict=True)), "scores")


class _sites_of:
    """Inside, the plain loop looks for sites where the model's line has them."""

    def __init__(self, model: ke.EditableModel) -> None:
        self.modules = model.modules

    def __enter__(self) -> None:
        self.before = oracle.Plain.has, oracle.Plain.module, oracle.Plain.__init__
        modules = self.modules

        def start(plain: oracle.Plain, hf: nn.Module) -> None:
            plain.hf, plain.layers = hf, modules.layers

        oracle.Plain.has = lambda plain, site, layer: site not in modules.family.without
        oracle.Plain.module = lambda plain, site, layer: modules.site(site, layer)
        oracle.Plain.__init__ = start

    def __exit__(self, *raised: object) -> None:
        oracle.Plain.has, oracle.Plain.module, oracle.Plain.__init__ = self.before


def main(asked: list[str]) -> None:
    counted: Counter[str] = Counter()
    for name in asked or unlisted():  # those asked for may have a line: theirs is tried
        model_type, _, seed = name.partition("@")
        try:
            hf = tiny(model_type, int(seed or 0))
            line = FAMILIES.get(model_type) or guessed(hf)
        except Exception as error:
            counted["not built"] += 1
            print(f"{name:24} not built: {type(error).__name__}: {str(error)[:160]!r}", flush=True)
            continue
        for whole in (False, True):
            found = verdict(hf, replace(line, whole=whole))
            counted[found.said] += 1
            print(f"{name:24} {'whole' if whole else 'tree':5} {found.said:8} {found.why[:200]!r}", flush=True)
            if found.said == "right":
                break
    print(", ".join(f"{count} {said}" for said, count in sorted(counted.items())))


if __name__ == "__main__":
    main(sys.argv[1:])
