"""Generation: the model's own greedy text, the exact sampling rule, and nothing that depends on the batch."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.evaluation import generation
from knowedit_ext.evaluation.generation import generate, pick, record_seed

from ..support.families import FAMILIES, POSITIONS, VOCAB, tiny_hf, tiny_model
from ..support.tokenizers import byte_bpe, word_level
from ..support.unchanged import assert_unchanged, snapshot

LENGTHS = (5, 2, 9, 1, 5, 7, 3)  # below and above the sliding windows of 3


def words(length: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(2, VOCAB)}" for _ in range(length))


PROMPTS = [words(length, seed) for seed, length in enumerate(LENGTHS)]
SEEDS = [record_seed(7, number) for number in range(len(PROMPTS))]


def ids_of(model: ke.EditableModel, text: str) -> list[int]:
    return model.tokenizer(text)["input_ids"]


@torch.no_grad()
def plainly(model: ke.EditableModel, prompt: str, seed: int, max_length: int, top_k: int) -> str:
    """The published rule, one text, no cache: multinomial over the renormalised top k, by the inverse CDF."""
    ids = ids_of(model, prompt)
    uniforms = np.random.Generator(np.random.PCG64(seed)).random(max_length)
    for uniform in uniforms[: max(0, max_length - len(ids))]:
        p = model.hf(torch.tensor([ids]), use_cache=False).logits[0, -1].double().softmax(0).numpy()
        top = sorted(np.argsort(-p, kind="stable")[:top_k])
        cdf = np.cumsum(p[top] / p[top].sum())
        ids.append(int(top[min(np.searchsorted(cdf, uniform, side="right"), top_k - 1)]))
    return model.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_models_own(family: str) -> None:
    model, length = tiny_model(family), 24
    got = generate(model, PROMPTS, SEEDS, max_length=length, top_k=1, batch=4)
    for prompt, text in zip(PROMPTS, got, strict=True):
        ids = torch.tensor([ids_of(model, prompt)])
        settings = dict(do_sample=False, max_length=length, eos_token_id=VOCAB, pad_token_id=0)
        wanted = model.hf.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0]
        assert len(wanted) == length
        assert text == model.tokenizer.decode(wanted, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_by_the_published_rule(family: str) -> None:
    model = tiny_model(family)
    before = snapshot(model.hf)
    got = generate(model, PROMPTS, SEEDS, max_length=20)
    assert got == [plainly(model, *pair, 20, 5) for pair in zip(PROMPTS, SEEDS, strict=True)]
    assert_unchanged(before, model.hf)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_same_whatever_the_batch_the_order_and_what_is_left(family: str) -> None:
    model = tiny_model(family)
    prompts, seeds = PROMPTS * 2, [record_seed("case", n) for n in range(2 * len(PROMPTS))]
    whole = generate(model, prompts, seeds, max_length=26, batch=64)
    assert len(set(whole)) == len(whole)
    for batch in (1, 5):
        assert generate(model, prompts, seeds, max_length=26, batch=batch) == whole
    order = random.Random(3).sample(range(len(prompts)), len(prompts))
    mixed = generate(model, [prompts[n] for n in order], [seeds[n] for n in order], max_length=26, batch=4)
    assert mixed == [whole[n] for n in order]
    assert generate(model, prompts[9:], seeds[9:], max_length=26) == whole[9:]


def test_rounding_does_not_tip_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers on the very steps of the cumulated probability, logits that change with the batch."""
    model = ke.load_model((tiny_hf("gpt2"), word_level(VOCAB)))
    p = model.hf(torch.tensor([ids_of(model, PROMPTS[0])])).logits[0, -1].detach().double().softmax(0)
    top = p.topk(5).indices.sort().values
    step = float((p[top] / p[top].sum()).cumsum(0)[1])

    class OnTheStep:
        def random(self, count: int) -> np.ndarray:
            return np.full(count, step)

    monkeypatch.setattr(generation.np.random, "Generator", lambda bits: OnTheStep())

    def rounding(module, args, output):
        rows = output.shape[0]
        return output + 1e-5 * torch.sin(torch.arange(output.shape[-1]) * rows) if rows > 1 else output

    model.modules.head.register_forward_hook(rounding)
    texts = {generate(model, PROMPTS[:1] * n, [0] * n, max_length=len(PROMPTS[0].split()) + 1)[0] for n in range(1, 9)}
    assert len(texts) == 1


def test_one_step_inverts_the_cumulated_probability() -> None:
    values = np.log(np.array([[0.4, 0.25, 0.2, 0.1, 0.05, 0.01]]))
    tokens = np.array([[30, 7, 50, 2, 41, 9]])  # by number: 2, 7, 30, 41, 50 up to .1, .35, .75, .8, 1
    drawn = {0.0: 2, 0.0999: 2, 0.1001: 7, 0.3499: 7, 0.3501: 30, 0.7499: 30, 0.7501: 41, 0.8001: 50, 1 - 2**-53: 50}
    for uniform, token in drawn.items():
        chosen, margin = pick(values, tokens, np.array([uniform]), 5)
        assert chosen.tolist() == [token]
        assert margin[0] == pytest.approx(min(abs(uniform - step) for step in (0.1, 0.35, 0.75, 0.8)))
    assert pick(values, tokens, np.array([0.99]), 1)[0].tolist() == [30]
    assert pick(values, tokens, np.array([0.5]), 1)[1][0] == pytest.approx(np.log(0.4 / 0.25))
    assert pick(values, tokens, np.array([0.99]), 100)[0].tolist() == [50]


def test_shares_of_a_step_are_the_softmax_over_the_top_five() -> None:
    model, count = tiny_model("gpt2"), 400
    p = model.hf(torch.tensor([ids_of(model, PROMPTS[0])])).logits[0, -1].detach().double().softmax(0)
    top = p.topk(5)
    length = LENGTHS[0] + 1
    texts = generate(model, [PROMPTS[0]] * count, [record_seed(n, 0) for n in range(count)], max_length=length)
    for token, share in zip(top.indices.tolist(), (top.values / top.values.sum()).tolist(), strict=True):
        drawn = sum(text.split()[-1] == f"w{token}" for text in texts) / count
        assert abs(drawn - share) < 4 * (share * (1 - share) / count) ** 0.5 + 1e-9


def test_seeds_are_fixed_numbers() -> None:
    assert record_seed(0, 0) == record_seed("0", 0) == 3153696582655363665
    assert len({record_seed(case, n) for case in range(50) for n in range(20)}) == 1000


class AddAtHead:
    """Stands in for row edits: edit e adds `bias[e]` to the logits of its sequences."""

    def __init__(self, model: ke.EditableModel, bias: torch.Tensor) -> None:
        self.model, self.bias = model, bias

    @contextmanager
    def rows(self, index: torch.Tensor):
        table = torch.cat([self.bias, torch.zeros(1, self.bias.shape[1])])  # -1: none

        def hook(module, args, output):
            assert len(index) == len(output)
            return output + table[index][:, None]

        handle = self.model.modules.head.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def test_each_text_by_its_own_edit() -> None:
    model = tiny_model("gpt2")
    edits = AddAtHead(model, 3 * torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)))
    index = [0, -1, 2, 1, 1, -1, 0]
    got = generate(model, PROMPTS, SEEDS, max_length=30, edits=edits, index=index, batch=3)
    for number, edit in enumerate(index):
        with edits.rows(torch.tensor([edit])):
            assert got[number] == generate(model, [PROMPTS[number]], [SEEDS[number]], max_length=30)[0]
    plain = generate(model, PROMPTS, SEEDS, max_length=30)
    assert [a == b for a, b in zip(got, plain, strict=True)] == [edit == -1 for edit in index]


def test_goes_on_behind_the_end_unless_told_to_stop() -> None:
    hf, end = tiny_hf("gpt2"), 2
    hf.lm_head.bias = None
    tokenizer = word_level(VOCAB)
    tokenizer.add_special_tokens({"eos_token": "w2"})
    model = ke.load_model((hf, tokenizer))
    wanting_the_end = AddAtHead(model, torch.nn.functional.one_hot(torch.tensor([end]), VOCAB) * 30.0)
    given = dict(max_length=30, edits=wanting_the_end, index=[0] * len(PROMPTS))
    stopped = generate(model, PROMPTS, SEEDS, stop_at_eos=True, **given)
    whole = generate(model, PROMPTS, SEEDS, **given)
    for prompt, short, text in zip(PROMPTS, stopped, whole, strict=True):
        assert short == model.tokenizer.decode(ids_of(model, prompt), skip_special_tokens=True)
        assert text.startswith(short) and len(text) >= len(short)
    few = AddAtHead(model, torch.nn.functional.one_hot(torch.tensor([end]), VOCAB) * 4.0)
    given |= dict(edits=few)
    short, long = (generate(model, PROMPTS, SEEDS, stop_at_eos=stop, **given) for stop in (True, False))
    assert all(b.startswith(a) for a, b in zip(short, long, strict=True)) and short != long
    assert short == generate(model, PROMPTS, SEEDS, stop_at_eos=True, batch=2, **given)


def test_text_is_cleaned_as_published() -> None:
    model = ke.load_model((tiny_hf("gpt2", vocab_size=340), byte_bpe(bos=True)))
    whole = generate(model, ["Miles ﬁnds\n\nthe é<|endoftext|>"], [1], max_length=60)[0]
    assert whole.startswith("Miles finds the e\u0301") and "<s>" not in whole


def test_lengths() -> None:
    model = tiny_model("gpt2")
    texts = generate(model, PROMPTS, SEEDS, max_length=6)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = ids_of(model, prompt)
        assert text == model.tokenizer.decode(ids) if len(ids) >= 6 else len(text.split()) <= 6
    assert generate(model, [], [], max_length=6) == []
    full = generate(model, [PROMPTS[0]], [1], max_length=POSITIONS)[0]
    assert full.startswith(PROMPTS[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(prompts="w3 w4", seeds=[1]), "one string"),
        (dict(seeds=[1, 2]), "1 prompts, but 2 seeds"),
        (dict(prompts=[""]), "prompt 0 .* has no token"),
        (dict(max_length=POSITIONS + 1), f"the model has {POSITIONS} positions"),
        (dict(top_k=0), "top_k is 0"),
        (dict(batch=0), "batch is 0"),
        (dict(index=[0]), "edits and index"),
        (dict(stop_at_eos=True), "no end-of-sequence token"),
    ],
)
def test_bad_input(given: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        generate(tiny_model("gpt2"), **(dict(prompts=["w3"], seeds=[1], max_length=20) | given))


def test_logits_that_are_no_numbers_are_named() -> None:
    model = ke.load_model((tiny_hf("gpt2"), word_level(VOCAB)))
    with torch.no_grad():
        model.modules.final_norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        generate(model, ["w3 w4"], [1], max_length=8)
