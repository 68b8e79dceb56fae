"""Cases of `gpu.py`: tracing, moments, values and insertion on random models of GPT-2 XL's and GPT-J's size."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import editing
import naive
import naive_editing
import naive_moments
import numpy as np
import torch
from gpu_measure import BF16, FLOAT32, TF32, Bench, Rows, check
from gpu_report import Row
from moments import long_texts
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM, PreTrainedModel

import knowedit_ext as ke
from knowedit_ext.editing.request import EditRequest, lookup
from knowedit_ext.editing.tokenized import tokenize_requests
from knowedit_ext.editing.values import KL_PROMPT, optimise_values
from knowedit_ext.model.facts import tokenize_fact
from knowedit_ext.model.tokens import encode_all
from knowedit_ext.sweep import sweep
from knowedit_ext.tracing.causal import plan_facts
from knowedit_ext.tracing.cells import all_cells
from knowedit_ext.tracing.kinds import KINDS, window_for, window_layers
from knowedit_ext.tracing.settings import TraceSettings
from knowedit_ext.world import load_world

EDITED_LAYERS = (3, 4, 5, 6, 7, 8)  # MEMIT's on GPT-J
PUBLISHED_TOKENS, PUBLISHED_EDITS = 44_000_000, 10_000


def gpt2_xl(bench: Bench) -> PreTrainedModel:
    size = bench.pick(dict(n_embd=1600, n_layer=48, n_head=25), dict(n_embd=32, n_layer=10, n_head=2))
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **size))


def gpt_j(bench: Bench) -> PreTrainedModel:
    size = bench.pick({}, dict(n_embd=32, n_layer=10, n_head=2, rotary_dim=4))
    return GPTJForCausalLM(GPTJConfig(bos_token_id=0, eos_token_id=0, **size))


def random_model(
    bench: Bench, build: Callable[[Bench], PreTrainedModel], dtype: torch.dtype, precision: str | None = None
) -> ke.EditableModel:
    """Random weights, made on the device; the built-in world's tokenizer over a larger vocabulary."""
    torch.manual_seed(0)
    with torch.device(bench.device):
        hf = build(bench)
    tokenizer = AutoTokenizer.from_pretrained(load_world().folder)
    return ke.load_model((hf.to(dtype), tokenizer), precision=precision)


def prompt_of_12(model: ke.EditableModel) -> ke.Fact:
    subject = load_world().facts()[0]["subject"]
    for fillers in range(12):
        fact = ke.Fact("{}" + " is" * fillers, subject)
        if len(tokenize_fact(model, fact).ids) == 12:
            return fact
    raise RuntimeError("no prompt of 12 tokens found")


def trace(bench: Bench) -> Rows:
    """The three maps of one prompt (12 tokens, the subject first), 10 samples, in bfloat16."""
    for build in (gpt2_xl, gpt_j):
        yield partial(_trace, bench, build, torch.bfloat16, BF16, 0.1)


def trace_float32(bench: Bench) -> Rows:
    """The same in TF32 and in exact float32."""
    for build in (gpt2_xl, gpt_j):
        yield partial(_trace, bench, build, torch.float32, TF32, 0.05)
        yield partial(_trace, bench, build, torch.float32, FLOAT32, 1e-3)


def _trace(
    bench: Bench, build: Callable[[Bench], PreTrainedModel], dtype: torch.dtype, ceiling: str, allowed: float
) -> Row:
    model = random_model(bench, build, dtype, "tf32" if ceiling == TF32 else None)
    name = f"trace {build.__name__}, {ceiling.split()[0]}, three maps"
    fact, noise = prompt_of_12(model), 0.1
    maps = {kind: ke.trace(model, fact, kind, noise=noise) for kind in KINDS}
    tokenized = tokenize_fact(model, fact)
    # The loop takes its time: every eighth layer, the whole by proportion.
    layers = range(0, model.num_layers, 8)
    error, plain_seconds = 0.0, 0.0
    for kind in KINDS:
        sites = [_sites(model, kind, layer) for layer in layers]
        cells = [sites] * len(tokenized.ids)
        arguments = (model.hf, model.modules.embedding, cells, list(tokenized.ids), tokenized.subject_range, noise)
        result: list[tuple] = []
        seconds = bench.seconds_once(lambda: result.append(naive.causal_trace(*arguments)))  # noqa: B023
        plain_seconds += seconds * model.num_layers / len(layers)
        ours = maps[kind].scores[:, list(layers)]
        error = max(error, float(np.abs(ours - result[0][0]).max() / np.abs(result[0][0]).mean()))
    check(name, error, allowed)
    every = bench.seconds(lambda: [ke.trace(model, fact, kind, noise=noise) for kind in KINDS], 3)
    state = bench.seconds(lambda: ke.trace(model, fact, noise=noise), 3)
    facts = {"state_map_seconds": state, "plain_loop": f"{len(layers)} of {model.num_layers} layers, by proportion"}
    others = {"plain loop": plain_seconds}
    return Row(name, error, every, _trace_flops(model, fact, noise), ceiling, others, facts)


def _sites(model: ke.EditableModel, kind: str, layer: int) -> list[torch.nn.Module]:
    if kind == "state":
        return [model.modules.layers[layer]]
    return [
        model.modules.site(kind, w)
        for w in window_layers(layer, window_for(model.num_layers, None, (kind,)), model.num_layers)
    ]


def _trace_flops(model: ke.EditableModel, fact: ke.Fact, noise: float) -> int:
    """Of the layers' matrices and the head, as counted by the sweeps."""
    total = 0
    for kind in KINDS:
        (plan,) = plan_facts(model, [fact], (kind,), noise, TraceSettings())
        swept = sweep(model, [plan.clean], all_cells((plan.shape,), (kind,))[0], plan.hidden)
        total += swept.flops + 2 * len(swept.states) * model.modules.head.weight.numel()
    return total


def moments(bench: Bench) -> Rows:
    """Six layers of GPT-J in one pass."""
    for dtype, ceiling in ((torch.bfloat16, BF16), (torch.float32, FLOAT32)):
        yield partial(_moments, bench, dtype, ceiling)


def _moments(bench: Bench, dtype: torch.dtype, ceiling: str) -> Row:
    model = random_model(bench, gpt_j, dtype)
    texts, few, layer = long_texts(bench.pick(100_000, 600)), long_texts(bench.pick(1000, 100)), EDITED_LAYERS[-1]
    counts: list[int] = []

    def collect(texts: list[str]) -> None:
        counts.append(ke.collect_moments(model, texts, EDITED_LAYERS, progress=False)[layer].count)

    ids = encode_all(model, few, model.modules.max_positions)
    module = model.modules.down_projection(layer)
    plain, count = naive_moments.layer_moment(model.hf, module, ids, model.modules.max_positions)
    moment = ke.collect_moments(model, few, [layer], progress=False)[layer]
    name = f"moments of {len(EDITED_LAYERS)} layers of gpt_j, {ceiling.split()[0]}"
    if moment.count != count:
        check(name, float("inf"), 0)
    difference = moment.matrix().to(bench.device) - plain.float()
    error = check(name, float(difference.norm() / plain.float().norm()), 2e-2 if dtype != torch.float32 else 1e-4)
    # The check has warmed it. Of a few tokens it is the moments' way to the host that takes time, once for all tokens.
    fixed, seconds = (bench.seconds_once(partial(collect, some)) for some in (few, texts))
    each = (seconds - fixed) / (counts[1] - counts[0])
    facts = {
        "tokens": counts[1],
        "seconds_for_few_tokens": fixed,
        "minutes_for_44M_tokens": (fixed + PUBLISHED_TOKENS * each) / 60,
        "published_hours": 36,
    }
    return Row(name, error, seconds, facts=facts)


def edits(bench: Bench) -> Rows:
    """z of 64 edits, then their insertion in six layers, at GPT-J's size in float32."""
    model = random_model(bench, gpt_j, torch.float32)
    count = bench.pick(64, 3)
    requests = [EditRequest.of(record) for record in random.Random(0).sample(load_world().records(), count)]
    params = ke.MEMITParams(layers=EDITED_LAYERS, v_num_grad_steps=bench.pick(25, 3))
    yield partial(_values, bench, model, requests, params)
    yield partial(_insert, bench, model, requests, params)


def _values(bench: Bench, model: ke.EditableModel, requests: list[EditRequest], params: ke.MEMITParams) -> Row:
    count, layer = len(requests), params.layers[-1]
    flat = [context for group in editing.CONTEXTS for context in group]
    name = f"z of {count} edits at gpt_j's size, float32"
    error = check(name, _value_error(model, requests[0], flat, params), 1e-2)
    tokenized = lambda: tokenize_requests(model, requests, flat, params.fact_token)  # noqa: E731
    optimise = lambda: optimise_values(model, tokenized(), params, "layer", layer)  # noqa: E731
    seconds = bench.seconds_once(optimise)
    facts = {"edits": count, "minutes_for_10k_edits": PUBLISHED_EDITS / count * seconds / 60, "published_hours": 7.4}
    return Row(name, error, seconds, facts=facts)


def _value_error(model: ke.EditableModel, request: EditRequest, contexts: list[str], params: ke.MEMITParams) -> float:
    """Of one edit's value, against the plain loop over the same steps."""
    layer = params.layers[-1]
    kl = tokenize_fact(model, ke.Fact(KL_PROMPT, request.subject))
    texts = editing.texts(model, request, contexts, True)
    settings = (params.v_num_grad_steps, params.v_lr, params.v_weight_decay, params.clamp_norm_factor, params.kl_factor)
    last = naive_editing.Text(kl.ids, lookup(kl, "subject_last"))
    plain = naive_editing.compute_z(model.hf, model.modules.layers[layer], texts, last, *settings)
    tokenized = tokenize_requests(model, [request], contexts, params.fact_token)
    ours = optimise_values(model, tokenized, params, "layer", layer).values[0]
    return float((ours.to(plain) - plain).norm() / plain.norm())


def _insert(bench: Bench, model: ke.EditableModel, requests: list[EditRequest], params: ke.MEMITParams) -> Row:
    projections = [model.modules.down_projection(layer) for layer in params.layers]
    width = projections[0].in_features
    samples = bench.randn(2 * width, width)
    matrix = samples.T @ samples / len(samples)
    values = bench.randn(len(requests), model.hidden_size, seed=1)

    def insert(requests: list[EditRequest]) -> ke.Edit:  # fresh moments, whose factors are not kept yet
        moments = ke.Moments.from_arrays({layer: (matrix, 10 * width) for layer in params.layers})
        return ke.memit(model, requests, params, moments, contexts=editing.CONTEXTS, values=values[: len(requests)])

    some = requests[:2]
    groups = [[editing.texts(model, r, group, False) for group in editing.CONTEXTS] for r in some]
    layers = [model.modules.layers[layer] for layer in params.layers]
    plain = naive_editing.insert(
        model.hf, layers, projections, groups, values[:2], [matrix] * len(layers), params.mom2_update_weight
    )
    ours = insert(some)
    names = [f"{model.modules.parameter_name(layer)}.weight" for layer in params.layers]
    errors = [float((ours.delta(n).to(p) - p).norm() / p.norm()) for n, p in zip(names, plain, strict=True)]
    name = f"insertion of {len(requests)} edits in {len(layers)} layers at gpt_j's size, float32"
    return Row(name, check(name, max(errors), 1e-3), bench.seconds_once(lambda: insert(requests)))


CASES = {case.__name__: case for case in (trace, trace_float32, moments, edits)}
