"""The head against the model's own forward pass: every scale, cap and bias, every dtype, chunked or not."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import knowedit_ext as ke
from knowedit_ext.model import families, head
from knowedit_ext.model.families import UnsupportedModelError
from knowedit_ext.sweep.capture import clean_runs
from knowedit_ext.sweep.packed import PackedPrompts

from ..editing.test_beside import Int8Linear
from ..support.families import FAMILIES, VOCAB, spread_weights, tiny_hf
from ..support.tokenizers import word_level

IDS = [3, 4, 5, 6, 7, 8]
# Families whose ForCausalLM scales, with factors that are no power of two.
SCALED = {
    "cohere": dict(logit_scale=0.3),
    "cohere2": dict(logit_scale=0.3),
    "granite": dict(logits_scaling=3.0),
    "hyperclovax": dict(logits_scaling=0.3),
    "minicpm3": dict(
        dim_model_base=11, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16
    ),
}
CAPPED = {"nanochat": dict(final_logit_softcapping=2.0), "vaultgemma": dict(final_logit_softcapping=2.0)}


def planted(monkeypatch: pytest.MonkeyPatch, kind: str, seed: int = 0, **more) -> ke.EditableModel:
    """A tiny model of a family that has no entry yet, with one."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no '{kind}'")
    path = "mlp.fc2" if kind == "nanochat" else "mlp.down_proj"
    line = dataclasses.replace(families.FAMILIES["llama"], down_projection=path)
    monkeypatch.setitem(families.FAMILIES, kind, line)
    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    ends = dict(max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    config = CONFIG_MAPPING[kind](**(shape | ends | dict(num_key_value_heads=4, head_dim=8) | more))
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        hf.get_output_embeddings().weight.mul_(3.0)
    return ke.load_model((spread_weights(hf, 8.0), word_level(VOCAB)))


@torch.no_grad()
def own_logits(model: ke.EditableModel, ids: list[int] = IDS) -> torch.Tensor:
    return model.hf(torch.tensor([ids]), use_cache=False).logits[0].double()


@torch.no_grad()
def states_of(model: ke.EditableModel, ids: list[int] = IDS) -> torch.Tensor:
    packed = PackedPrompts(model, clean_runs(model, [ids]))
    return head.final_states(model, packed.run(packed.start, 0, model.num_layers))


def assert_reads_as_the_model(model: ke.EditableModel, tolerance: float = 1e-4) -> None:
    want, states = own_logits(model), states_of(model)
    with torch.no_grad():
        near = lambda a, b: torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=0)  # noqa: E731
        near(head.logits(model, states), want)
        logp = want.log_softmax(-1)
        near(head.distribution(model, states), logp)
        targets = torch.arange(len(IDS)) * 7 % VOCAB
        near(head.log_probabilities(model, states, targets), logp[torch.arange(len(IDS)), targets])
        wide = torch.stack([targets, targets.flip(0)], 1)
        near(head.log_probabilities(model, states, wide), logp.gather(1, wide))
        places = torch.tensor([5, 0, 3, 3])
        read, said = head.read_targets(model, states, places, torch.tensor([1, 2, 3, int(want[3].argmax())]))
        near(read, logp[places, torch.tensor([1, 2, 3, int(want[3].argmax())])])
        assert torch.equal(head.likeliest(model, states), want.argmax(-1))
        assert torch.equal(said, want.argmax(-1)[places])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_logits(family: str) -> None:
    assert_reads_as_the_model(ke.load_model((tiny_hf(family), word_level(VOCAB))))


@pytest.mark.parametrize(("kind", "more"), [*SCALED.items(), *CAPPED.items()])
def test_scales_and_caps(monkeypatch: pytest.MonkeyPatch, kind: str, more: dict) -> None:
    model = planted(monkeypatch, kind, **more)
    assert_reads_as_the_model(model)
    # The test sees a factor that is left out.
    monkeypatch.setattr(head.LogitForm, "of", classmethod(lambda cls, modules: cls()))
    with pytest.raises(AssertionError):
        assert_reads_as_the_model(model)


@pytest.mark.parametrize(("kind", "more"), SCALED.items())
@pytest.mark.filterwarnings("ignore:corrupting", "ignore:.*already continued")
def test_traces_edits_and_evaluation_of_scaled_families(monkeypatch: pytest.MonkeyPatch, kind: str, more: dict) -> None:
    model = planted(monkeypatch, kind, **more)
    ids = model.tokenizer("w5 w6 w3 w7 w9")["input_ids"]
    want = own_logits(model, ids)[-1].log_softmax(-1)
    trace = ke.trace(model, ke.Fact("w5 w6 {} w9", "w3 w7"), samples=2, noise=0.5)
    assert trace.high_score == pytest.approx(float(want.max().exp()), abs=1e-5)
    from knowedit_ext.evaluation.nll import Question, score

    [[answer]], _ = score(model, [Question("w5 w6 w3 w7 w9", (" w20",))])
    assert answer.nll == pytest.approx(-float(want[20]), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "more"), SCALED.items())
def test_every_precision(monkeypatch: pytest.MonkeyPatch, kind: str, more: dict, dtype: torch.dtype) -> None:
    """Against the head in float64 on the very states: only the products' rounding is left, none of the factor's."""
    model = planted(monkeypatch, kind, **more)
    form, matrix = head.LogitForm.of(model.modules), model.modules.head.weight.detach().to(dtype)
    states = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = (states.double() @ matrix.double().T * form.scale).log_softmax(-1)
    model.hf.to(dtype)
    targets = torch.arange(6) * 7
    with torch.no_grad():
        got = head.log_probabilities(model, states, targets).double()
    size = 4 * torch.finfo(dtype).eps * float((states.double() @ matrix.double().T).abs().max()) * form.scale
    assert float((got - want[torch.arange(6), targets]).abs().max()) < max(size, 1e-12)


@pytest.mark.parametrize("case", ["plain", "bias", "bias and scale", "quantised", "subclass"])
def test_kinds_of_heads(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted(monkeypatch, "granite", logits_scaling=3.0) if "scale" in case else None
    model = model or ke.load_model((tiny_hf("llama", tie_word_embeddings=False), word_level(VOCAB)))
    old = model.modules.head
    if "bias" in case:
        old.bias = nn.Parameter(torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)))
    if case == "quantised":
        model.hf.lm_head = Int8Linear(old)
    if case == "subclass":

        class Shifted(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) + torch.arange(VOCAB) * 0.1

        model.hf.lm_head = Shifted(32, VOCAB, bias=False)
        model.hf.lm_head.weight = old.weight
    assert_reads_as_the_model(ke.load_model((model.hf, model.tokenizer)))


def test_chunks_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted(monkeypatch, "cohere", logit_scale=0.3)
    states, targets = states_of(model), torch.arange(len(IDS))
    want = own_logits(model).log_softmax(-1)[torch.arange(len(IDS)), targets]
    for weights_too, few in ((False, 0), (False, VOCAB), (True, 0)):
        monkeypatch.setattr(head, "FEW_TOKENS", few)
        model.hf.requires_grad_(weights_too)
        variable = states.clone().requires_grad_()
        got = head.log_probabilities(model, variable, targets)
        got.sum().backward()
        plain = states.clone().requires_grad_()
        logits = model.modules.head(plain) * 0.3
        logits.log_softmax(-1)[torch.arange(len(IDS)), targets].sum().backward()
        torch.testing.assert_close(variable.grad, plain.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)
    monkeypatch.setattr(head, "HEAD_ROWS", 2)
    monkeypatch.setattr(head, "_plain", lambda *_: False)
    with torch.no_grad():
        got = head.log_probabilities(model, states, targets)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)
    assert_reads_as_the_model(model)


DIVERGING = {"plain": "llama", "scaled": "granite", "capped": "vaultgemma", "quantised": "llama", "bias": "gptj"}


@pytest.mark.parametrize("few", [0, VOCAB])
@pytest.mark.parametrize("case", DIVERGING)
def test_divergence(case: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL and its gradient in float64, and in float32 of states so near that it is small."""
    monkeypatch.setattr(head, "FEW_TOKENS", few)
    if case in ("scaled", "capped"):
        model = planted(monkeypatch, DIVERGING[case], **(SCALED | CAPPED)[DIVERGING[case]])
    else:
        model = ke.load_model((tiny_hf(DIVERGING[case], tie_word_embeddings=False), word_level(VOCAB)))
    if case == "quantised":
        model.hf.lm_head = Int8Linear(model.modules.head)
        model = ke.load_model((model.hf, model.tokenizer))
    model.hf.requires_grad_(False)
    before = states_of(model)
    near = before + 1e-2 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    for after, tolerance in ((before + 0.5, 1e-5), (near, 2e-3)):
        plain = after.double().requires_grad_()
        weight = model.modules.head.weight if case != "quantised" else None
        if weight is None:
            old, new = (head.distribution(model, x).double() for x in (before, after))
            want = (old.exp() * (old - new)).sum(-1)
        else:
            form, bias = head.LogitForm.of(model.modules), model.modules.head.bias

            def say(x: torch.Tensor, form=form, weight=weight, bias=bias) -> torch.Tensor:
                out = x.double() * form.states_scale @ weight.double().T + (0 if bias is None else bias.double())
                out = out * form.logits_scale
                return (torch.tanh(out / form.softcap) * form.softcap if form.softcap else out).log_softmax(-1)

            want = (say(before).exp() * (say(before) - say(plain))).sum(-1)
            want.sum().backward()
        asked = after.clone().requires_grad_()
        counts = [2, len(before) - 2]
        said = head.Said.join(head.Said.of(model, before).split(counts))
        got = head.divergence(model, said, asked)
        got.sum().backward()
        torch.testing.assert_close(got.double(), want.detach(), atol=1e-6, rtol=tolerance)
        if weight is not None:
            assert (asked.grad - plain.grad).norm() <= tolerance * plain.grad.norm()
            assert (said.mean is None) == (case == "capped" or few > 0)


def test_divergence_of_half_precision_states() -> None:
    """Sums that nearly cancel are made in float32: bfloat16 would leave nothing of a small divergence."""
    model = ke.load_model((tiny_hf("gpt2"), word_level(VOCAB)))
    before = states_of(model).bfloat16()
    after = (before.float() + 0.1).bfloat16()
    model.hf.to(torch.bfloat16).requires_grad_(False)
    weight = model.modules.head.weight.double()
    plain = after.double().requires_grad_()
    old, new = ((x.double() @ weight.T).log_softmax(-1) for x in (before, plain))
    want = (old.exp() * (old - new)).sum(-1)
    want.sum().backward()
    asked = after.clone().requires_grad_()
    got = head.divergence(model, head.Said.of(model, before), asked)
    got.sum().backward()
    torch.testing.assert_close(got.double(), want.detach(), atol=1e-5, rtol=1e-3)
    assert (asked.grad.double() - plain.grad).norm() <= 2**-7 * plain.grad.norm()


@pytest.mark.parametrize("value", ["inv_sqrt", -1.0, 0.0, float("nan"), float("inf")])
def test_a_factor_that_is_no_number(monkeypatch: pytest.MonkeyPatch, value: object) -> None:
    model = planted(monkeypatch, "cohere")
    model.modules.config.__dict__["logit_scale"] = value
    with pytest.raises(UnsupportedModelError, match="logit_scale"):
        head.logits(model, torch.zeros(1, 32))


def test_one_reader() -> None:
    """No other file of the package reads how logits come about."""
    package = Path(ke.__file__).parent
    names = {*head._SCALES, *head._SOFTCAPS}
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        reads = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert path.name == "head.py" or not names & (strings | reads), path
        called = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert path.name == "head.py" or not any(c.endswith(("modules.head", "final_norm")) for c in called), path
