"""Collected moments against the plain loop: one text at a time, unpadded, in float64."""

from __future__ import annotations

import random

import pytest
import torch
from support.families import FAMILIES, POSITIONS, tiny_hf, tiny_model
from support.tokenizers import byte_bpe, word_level

import knowedit_ext as ke
from knowedit_ext.model.tokens import encode_all
from knowedit_ext.moments import batches

LAYERS = [0, 2, 3]


def texts(count: int = 40, longest: int = 20, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = [f"w{i}" for i in range(60) if i != 1]
    return [" ".join(draw.choices(words, k=draw.randint(1, longest))) for _ in range(count)]


@torch.no_grad()
def plain(model: ke.EditableModel, ids: list[list[int]], layer: int) -> tuple[torch.Tensor, int]:
    keys: list[torch.Tensor] = []
    hook = model.modules.down_projection(layer).register_forward_pre_hook(lambda m, args: keys.append(args[0][0]))
    for text in ids:
        model.hf(torch.tensor([text]))
    hook.remove()
    every = torch.cat(keys).double()
    return every.T @ every / len(every), len(every)


def tokens(model: ke.EditableModel, some: list[str]) -> list[list[int]]:
    return [model.tokenizer(text)["input_ids"][:POSITIONS] for text in some]


def assert_same(moment, want: torch.Tensor, count: int) -> None:
    assert moment.count == count
    got = moment.matrix()
    assert got.dtype == torch.float32 and torch.equal(got, got.T)
    assert float((got.double() - want).abs().max() / want.abs().max()) < 2e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family):
    model, some = tiny_model(family), texts()
    moments = ke.collect_moments(model, some, LAYERS, batch_tokens=64, progress=False)
    assert moments.layers == LAYERS
    for layer in LAYERS:
        assert_same(moments[layer], *plain(model, tokens(model, some), layer))


def test_the_model_is_left_as_found_and_stops_at_the_highest_layer():
    model = tiny_model("gpt2")
    ran = []
    hooks = [m.register_forward_hook(lambda *a, n=n: ran.append(n)) for n, m in enumerate(model.modules.layers)]
    ke.collect_moments(model, texts(3), [1, 0], progress=False)
    for hook in hooks:
        hook.remove()
    assert set(ran) == {0}  # layer 1 was left before its end
    assert not any(m._forward_pre_hooks for m in model.hf.modules())
    assert not model.hf.training


def test_dropout_is_off():
    model = ke.load_model((tiny_hf("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), word_level()))
    want = ke.collect_moments(model, texts(5), [1], progress=False)
    model.hf.train()
    got = ke.collect_moments(model, texts(5), [1], progress=False)
    assert torch.equal(want[1].mean, got[1].mean) and model.hf.training


def test_texts_are_cut_to_the_models_positions():
    model, long = tiny_model("gpt2"), [" ".join(["w5"] * 200), "w3 w4"]
    assert ke.collect_moments(model, long, [0], progress=False)[0].count == POSITIONS + 2
    assert ke.collect_moments(model, long, [0], max_length=7, progress=False)[0].count == 9


@pytest.mark.parametrize("limit", [1, 50, 117])
def test_max_tokens_cuts_the_text_that_goes_over(limit, monkeypatch):
    monkeypatch.setattr("knowedit_ext.moments.collect.GROUP", 4)
    model, some = tiny_model("llama"), texts()
    moments = ke.collect_moments(model, some, [1], max_tokens=limit, batch_tokens=40, progress=False)
    ids, left = [], limit
    for text in tokens(model, some):
        if left:
            ids.append(text[:left])
            left -= len(ids[-1])
    assert_same(moments[1], *plain(model, ids, 1))


def test_special_tokens_as_the_model_asks():
    hf = tiny_hf("llama", vocab_size=400)
    for bos, tokenizer in [(None, byte_bpe()), (True, byte_bpe()), (None, byte_bpe(eos=True))]:
        model = ke.load_model((hf, tokenizer), bos=bos)
        some = ["Miles", "", "trumpet Miles"]
        ids = [t for t in encode_all(model, some) if t]
        assert len(ids) == 2 and all(t[-1] != 2 for t in ids)
        if bos or tokenizer.bos_token_id in tokenizer("Miles")["input_ids"]:
            assert all(t[0] == 1 for t in ids)
        moments = ke.collect_moments(model, some, [0], progress=False)
        assert_same(moments[0], *plain(model, ids, 0))
    model = ke.load_model((hf, byte_bpe(bos=True)), bos=False)
    assert all(t[0] != 1 for t in encode_all(model, ["Miles"]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype):
    model = ke.load_model((tiny_hf("gpt2"), word_level()), dtype=dtype)
    some = texts(10)
    want, count = plain(model, tokens(model, some), 1)
    got = ke.collect_moments(model, some, [1], progress=False)[1]
    assert got.count == count
    assert float((got.mean - want).abs().max() / want.abs().max()) < (5e-2 if dtype == "bfloat16" else 1e-12)


def test_products_in_float64():
    model, some = tiny_model("gpt2"), texts(5)
    single, double = (
        ke.collect_moments(model, some, [1], batch_tokens=20, products=kind, progress=False)[1]
        for kind in ("float32", "float64")
    )
    assert_same(double, *plain(model, tokens(model, some), 1))
    eigenvalues = torch.linalg.eigvalsh(double.mean)  # fewer keys than the width: the rest must be nothing but rounding
    assert float(eigenvalues[0]) > -1e-13 * float(eigenvalues[-1])
    assert float(torch.linalg.eigvalsh(single.mean)[0]) < float(eigenvalues[0])


def test_batches_hold_every_token_once_within_the_budget():
    ids = [[n] * random.Random(n).randint(0, 30) for n in range(50)]
    made = batches.make_batches(ids, 100, seed=3)
    assert sum(b.tokens for b in made) == sum(map(len, ids))
    assert all(b.ids.numel() <= 100 and int(b.mask.sum()) == b.tokens for b in made)
    seen = sorted(row[keep].tolist() for b in made for row, keep in zip(b.ids, b.mask, strict=True))
    assert seen == sorted(text for text in ids if text)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(layers=[]), "no layers"),
        (dict(layers=[4]), r"layer 4 is outside the model's 0\.\.3"),
        (dict(layers=[-1]), "layer -1 is outside"),
        (dict(max_tokens=0), "max_tokens is 0"),
        (dict(batch_tokens=0), "batch_tokens is 0"),
        (dict(stop="soon"), "unknown stop 'soon'"),
        (dict(stop="tolerance", tolerance=2.0), "tolerance is 2.0"),
        (dict(products="half"), "unknown products 'half'"),
        (dict(texts=[]), "no text to collect"),
        (dict(texts=["", ""]), "no text has a token"),
        (dict(texts=["w3", 5]), "text 1 is int: expected a string"),
        (dict(texts="no-such-file"), "'no-such-file' is neither a file nor a folder.*datasets library"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ke.collect_moments(
            **(dict(model=tiny_model("gpt2"), texts=["w3"], layers=[0], out=tmp_path, progress=False) | arguments)
        )
    assert not list(tmp_path.glob("layer*"))


def test_nan_in_the_weights_is_an_error():
    hf = tiny_hf("gpt2")
    hf.transformer.h[1].mlp.c_fc.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="keys of layer 1 are not finite"):
        ke.collect_moments(ke.load_model((hf, word_level())), texts(3), [0, 1], progress=False)
