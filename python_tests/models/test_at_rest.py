"""Whatever state the user's model is in, results are those of the model at rest, and every flag stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import knowedit_ext as ke
from knowedit_ext.editing.contexts import memit_contexts, rome_contexts
from knowedit_ext.editing.methods.memit import memit_values
from knowedit_ext.evaluation.generation import generate
from knowedit_ext.evaluation.metrics.essence import perplexity
from knowedit_ext.model.hooks import Hooks, Stop, at_rest, learning, named_arguments, resting
from knowedit_ext.moments.forward import key_width

from ..editing.models import fresh
from ..support.unchanged import assert_unchanged, snapshot
from .test_left_as_found import spread

pytestmark = pytest.mark.filterwarnings("ignore:corrupting", "ignore:.*already continued", "ignore:.*use_reentrant")

FACT = ke.Fact("w5 w6 {} w9 w10 w11", "w3 w7")
REQUESTS = [ke.EditRequest("w5 {} w9", "w3 w7", "w20"), ke.EditRequest("w6 {} w10", "w4", "w21")]
ROME = ke.ROMEParams(layers=(1,), v_num_grad_steps=3)
MEMIT = ke.MEMITParams(layers=(0, 1), v_num_grad_steps=3)
TUNING = ke.FTParams(layers=[1], num_steps=2, lr=1e-2)
CONTEXTS = ["{}", "w8 w9. {}"]
RECORD = dict(
    case_id=0,
    requested_rewrite=dict(prompt="w5 {} w9", subject="w3 w7", target_new={"str": "w20"}, target_true={"str": "w21"}),
    paraphrase_prompts=["w6 w3 w7 w10"],
    neighborhood_prompts=["w5 w4 w9"],
    generation_prompts=["w3 w7 w8"],
    attribute_prompts=[],
)


def dense(edit: ke.Edit) -> list[torch.Tensor]:
    return [edit.delta(name) for name in sorted(edit.changes)]


@cache
def second_moments(model: ke.EditableModel) -> ke.Moments:
    return ke.Moments.from_arrays({layer: (torch.eye(key_width(model, layer)).double(), 1000) for layer in (0, 1)})


def traced(model: ke.EditableModel, out: Path) -> list[Any]:
    ke.trace_dataset(model, [FACT], out, samples=2, noise=0.5, progress=False, window=2)
    return [np.load(file)["scores"] for file in sorted((out / "cases").iterdir())]


def evaluated(model: ke.EditableModel, edit: ke.Edit | None = None) -> Any:
    case = ke.evaluate(model, [RECORD], edit, max_length=12).cases[0]
    return [str(case[when]) for when in ("pre", "post") if when in case]


ACTIONS: dict[str, Callable[[ke.EditableModel, Path], Any]] = {
    "trace": lambda m, _: ke.trace(m, FACT, samples=2, noise=0.5).scores,
    "severed": lambda m, _: ke.trace(m, FACT, "mlp", 2, 2, noise=0.5, sever="attn", compat="reference").scores,
    "trace_dataset": traced,
    "noise_level": lambda m, _: ke.noise_level(m, "s3", subjects=["w3 w7", "w8"]),
    "rome_contexts": lambda m, _: rome_contexts(m, [(5, 2)]),
    "memit_contexts": lambda m, _: memit_contexts(m),
    "rome": lambda m, _: dense(ke.rome(m, REQUESTS[0], ROME, second_moments(m), contexts=CONTEXTS)),
    "rome_each": lambda m, _: [dense(e) for e in ke.rome_each(m, REQUESTS, ROME, second_moments(m), contexts=CONTEXTS)],
    "memit": lambda m, _: dense(ke.memit(m, REQUESTS, MEMIT, second_moments(m), contexts=[["{}"], CONTEXTS[1:]])),
    "memit_values": lambda m, _: memit_values(m, REQUESTS, MEMIT, contexts=[["{}"], CONTEXTS[1:]]),
    "finetune": lambda m, _: dense(ke.finetune(m, REQUESTS, TUNING)),
    "finetune as published": lambda m, _: dense(ke.finetune(m, REQUESTS, TUNING, compat="reference")),
    "evaluate": lambda m, _: evaluated(m),
    "evaluate an edit": lambda m, _: evaluated(m, ke.finetune(m, REQUESTS[:1], TUNING)),
    "generate": lambda m, _: generate(m, ["w3 w7 w8"] * 2, [1, 2], max_length=12),
    "perplexity": lambda m, _: perplexity(m, ["w3 w7 w8 w9"], max_length=9),
    "moments": lambda m, _: ke.collect_moments(m, ["w3 w7 w8", "w9 w4"], [1])[1].mean,
}

STATES: dict[str, Callable[[nn.Module], Any]] = {
    "train mode": lambda hf: hf.train(),
    "some modules in train mode": lambda hf: [m.train() for m in list(hf.modules())[-9::2]],
    "a root in eval mode above dropout in train mode": lambda hf: (hf.train(), setattr(hf, "training", False)),
    "gradient checkpointing": lambda hf: (hf.gradient_checkpointing_enable(), hf.train()),
    "reentrant checkpointing": lambda hf: (hf.gradient_checkpointing_enable(dict(use_reentrant=True)), hf.train()),
    "inputs that ask for gradients": lambda hf: (hf.enable_input_require_grads(), hf.train()),
    "some parameters ask": lambda hf: [p.requires_grad_(n % 2 == 0) for n, p in enumerate(hf.parameters())],
    "no parameter asks": lambda hf: hf.requires_grad_(False),
}

CALLERS: dict[str, Callable[[], AbstractContextManager]] = {
    "a caller as usual": nullcontext,
    "a caller without gradients": torch.no_grad,
    "a caller in inference mode": torch.inference_mode,
    "a caller in mixed precision": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def lively(family: str) -> ke.EditableModel:
    """A model with all of its family's dropouts."""
    drops = dict(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    return fresh(family, **(drops if family in ("gpt2", "gptj") else dict(attention_dropout=0.5)))


@cache
def calm(family: str, action: str) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return ACTIONS[action](lively(family), Path(folder))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)
    return a == b


@pytest.mark.parametrize(
    ("state", "caller"),
    [*((state, "a caller as usual") for state in STATES), *(("train mode", caller) for caller in list(CALLERS)[1:])],
)
@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_in_every_state(action: str, state: str, caller: str, tmp_path: Path) -> None:
    model = lively("gpt2")
    STATES[state](model.hf)
    want, before = calm("gpt2", action), snapshot(model.hf)
    with CALLERS[caller]():
        got = ACTIONS[action](model, tmp_path)
    assert_unchanged(before, model.hf)
    assert same(got, want)


@pytest.mark.parametrize("state", ["train mode", "gradient checkpointing"])
@pytest.mark.parametrize("action", ["trace", "rome", "memit", "finetune", "evaluate", "moments"])
@pytest.mark.parametrize("family", ["gptj", "llama", "gpt_neox", "gemma2"])
def test_other_families(family: str, action: str, state: str, tmp_path: Path) -> None:
    if (family, action) == ("gemma2", "memit"):
        pytest.skip("MEMIT is not defined there")
    model = lively(family)
    STATES[state](model.hf)
    want, before = calm(family, action), snapshot(model.hf)
    assert same(ACTIONS[action](model, tmp_path), want)
    assert_unchanged(before, model.hf)


def test_dropout_would_be_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The states above change results where nothing is done about them."""
    model = lively("gpt2")
    model.hf.train()
    monkeypatch.setattr("knowedit_ext.model.hooks._flag", lambda *_: None)
    for action in ACTIONS:
        if action == "noise_level":  # the embedding alone
            continue
        try:
            got = ACTIONS[action](model, tmp_path)
        except ke.UnsupportedModelError:  # of attention with dropout
            continue
        assert not same(got, calm("gpt2", action)), action


@pytest.mark.parametrize("how", ["disk", "some layers on disk"])
def test_offloaded_models(how: str, tmp_path: Path) -> None:
    """accelerate replaces the parameters in each forward pass: flags go by name."""
    model = lively("llama")
    hf = spread(model.hf, how, tmp_path)
    hf.train()
    for parameter in hf.parameters():
        parameter.requires_grad_(True)
    model = ke.load_model((hf, model.tokenizer))
    hf.train()
    ke.trace(model, FACT, samples=2, noise=0.5)
    assert all(p.requires_grad for p in hf.parameters()) and all(m.training for m in hf.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_when_it_is_cut_short(action: str, error: type[BaseException], tmp_path: Path) -> None:
    model = lively("gpt2")
    for state in ("gradient checkpointing", "some parameters ask"):
        STATES[state](model.hf)

    def fail(*_: Any) -> None:
        raise error("on purpose")

    broken = model.modules.embedding.register_forward_hook(fail)
    before = snapshot(model.hf)
    with pytest.raises(error, match="on purpose"):
        ACTIONS[action](model, tmp_path)
    assert_unchanged(before, model.hf)
    broken.remove()


def test_resting() -> None:
    model = lively("gpt2")
    for state in ("gradient checkpointing", "some parameters ask"):
        STATES[state](model.hf)
    before = snapshot(model.hf)
    with torch.inference_mode(), resting(model):
        for module in model.hf.modules():
            assert not module.training and not getattr(module, "gradient_checkpointing", False)
        assert not any(p.requires_grad for p in model.hf.parameters())
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        inside = snapshot(model.hf)
        with pytest.raises(KeyError), resting(model):
            raise KeyError
        assert_unchanged(inside, model.hf)
        with learning(model):
            assert torch.is_grad_enabled()
    assert_unchanged(before, model.hf)


def test_at_rest_keeps_name_signature_and_result() -> None:
    @at_rest
    def count(model: ke.EditableModel, times: int = 2) -> int:
        """Doc."""
        return times * sum(m.training for m in model.hf.modules())

    model = lively("gpt2")
    model.hf.train()
    assert count(model) == count(model=model, times=3) == 0 and count.__name__ == "count" and count.__doc__ == "Doc."


@pytest.mark.parametrize("wrong", [None, "gpt2", nn.Linear(2, 2)])
def test_what_is_no_model(wrong: object) -> None:
    with pytest.raises(TypeError, match="the model is .*: expected EditableModel, which knowedit_ext.load_model"):
        ke.trace(wrong, FACT)


def test_weights_made_in_inference_mode(tmp_path: Path) -> None:
    """Whatever needs no gradient works; what does says why it cannot."""
    with torch.inference_mode():
        model = lively("gpt2")
    for action in ("trace", "evaluate", "moments", "rome_contexts"):
        assert same(ACTIONS[action](model, tmp_path), calm("gpt2", action))
    for action in ("rome", "memit", "finetune"):
        with pytest.raises(ValueError, match="inference_mode"):
            ACTIONS[action](model, tmp_path)


def test_hooks() -> None:
    layer = nn.Linear(2, 2)
    seen = []
    with Hooks() as hooks:
        hooks.before(layer, lambda args, kwargs: seen.append(named_arguments(layer, args, kwargs)["input"]))
        hooks.before(layer, lambda args, kwargs: seen.append("first"), first=True)
        hooks.behind(layer, lambda out: out + 1)
        x = torch.zeros(1, 2)
        assert torch.equal(layer(input=x), layer.bias[None] + 1)
        assert seen == ["first", x]
    assert torch.equal(layer(x), layer.bias[None]) and len(seen) == 2

    def stop(*_: Any) -> None:
        raise Stop

    with Hooks() as hooks:
        hooks.behind(layer, stop)
        layer(x)
        raise AssertionError("the block was left")
    with pytest.raises(ZeroDivisionError), Hooks() as hooks:
        hooks.before(layer, stop)
        1 / 0  # noqa: B018
    assert not layer._forward_hooks and not layer._forward_pre_hooks
