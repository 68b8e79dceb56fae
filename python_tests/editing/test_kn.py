"""Knowledge neurons and KN, against the published loop written plainly: whole prompts, hooks, layer by layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing import neurons as kn_module
from knowedit_ext.sweep.newborn import NewbornRows

from ..support.families import FAMILIES
from .models import editable, fresh
from .plain import down_projection

REQUEST = ke.EditRequest("w5 {} w9 w10", "w3 w7", "w20 w23", "w31 w32")
PARAMS = ke.KNParams(steps=5)
PROMPTS = ["w3 w7 w11 w12", "w14 w3 w7 w15"]


def gate(model: ke.EditableModel, layer: int) -> torch.nn.Module:
    """Whose output the activation function reads, by the names that transformers gives it."""
    mlp = model.modules.mlp(layer)
    names = ("c_fc", "fc_in", "dense_h_to_4h", "gate_proj", "gate_up_proj")
    return next(module for name, module in mlp.named_children() if name in names)


def plain_scores(model: ke.EditableModel, ids: list[int], targets: list[int], steps: int) -> np.ndarray:
    """[layers, neurons] of the mean of the targets' probabilities behind `ids`."""
    scores = []
    for layer in range(model.num_layers):
        module, kept = gate(model, layer), []
        neurons = down_projection(model, layer).weight.numel() // model.hidden_size
        handle = module.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out[0, -1].detach()))
        with torch.no_grad():
            model.hf(torch.tensor([ids]), use_cache=False)
        handle.remove()
        total = torch.zeros(neurons)
        for point in range(steps):
            alpha = point / (steps - 1)
            value = (alpha * kept[0][:neurons]).requires_grad_()

            def put(m, a, out, value=value):
                out = out.clone()
                out[0, -1, : len(value)] = value
                return out

            handle = module.register_forward_hook(put)
            p = model.hf(torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1)[targets].mean()
            handle.remove()
            total += torch.autograd.grad(p, value)[0]
        scores.append((kept[0][:neurons] / steps * total).numpy())
    return np.stack(scores)


def words(*names: int) -> list[int]:
    return editable("gpt2").tokenizer(" ".join(f"w{n}" for n in names)).input_ids


def close(got: np.ndarray, want: np.ndarray) -> bool:
    return got.shape == want.shape and float(np.abs(got - want).max()) <= 1e-4 * float(np.abs(want).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_loop(family: str) -> None:
    """Each token of the answer is read behind those before it."""
    model = editable(family)
    first = plain_scores(model, words(5, 3, 7, 9, 10), words(31)[-1:], PARAMS.steps)
    second = plain_scores(model, words(5, 3, 7, 9, 10, 31), words(32)[-1:], PARAMS.steps)
    neurons = ke.knowledge_neurons(model, REQUEST, PARAMS)
    assert close(neurons.scores, (first + second) / 2)
    want = {tuple(map(int, n)) for n in np.argwhere(neurons.scores > 0.2 * neurons.scores.max())}
    assert set(neurons.neurons) == set(neurons.coarse[0]) == want


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_reference_reads_all_tokens_at_the_prompts_end(family: str) -> None:
    model = editable(family)
    want = plain_scores(model, words(5, 3, 7, 9, 10), words(31, 32)[-2:], PARAMS.steps)
    assert close(ke.knowledge_neurons(model, REQUEST, PARAMS, compat="reference").scores, want)


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_jobs_of_few_layers_are_as_one(monkeypatch, jobs: int) -> None:
    model = editable("gemma2")
    want = ke.knowledge_neurons(model, REQUEST, PARAMS, PROMPTS)
    split = lambda self, layers, copies: [list(layers[n : n + jobs]) for n in range(0, len(layers), jobs)]  # noqa: E731
    monkeypatch.setattr(NewbornRows, "jobs", split)
    neurons = ke.knowledge_neurons(model, REQUEST, PARAMS, PROMPTS)
    assert close(neurons.by_prompt, want.by_prompt)


def test_jobs_take_all_layers_once() -> None:
    rows = NewbornRows.__new__(NewbornRows)
    rows.model, rows.places = editable("llama"), [(0, 1)]
    for copies in (2, 5000, 10**9):
        assert sum(rows.jobs([0, 2, 3], copies)[::-1], []) == [0, 2, 3]


def test_prompts_and_refinement() -> None:
    model = editable("gpt2")
    union = ke.knowledge_neurons(model, REQUEST, PARAMS, PROMPTS)
    alone = [ke.knowledge_neurons(model, REQUEST, PARAMS).coarse[0]]
    for prompt in PROMPTS:
        template = prompt.replace("w3 w7", "{}")
        alone.append(ke.knowledge_neurons(model, replace(REQUEST, prompt=template), PARAMS).coarse[0])
    assert union.coarse == alone and union.neurons == sorted({n for each in alone for n in each})
    for p in (0.0, 0.4, 0.9):
        refined = ke.knowledge_neurons(model, REQUEST, replace(PARAMS, refine=True, p=p), PROMPTS)
        assert refined.neurons == [n for n in union.neurons if sum(n in each for each in alone) > 3 * p]


def test_layers_that_are_looked_at() -> None:
    model = editable("llama")
    every = ke.knowledge_neurons(model, REQUEST, PARAMS)
    some = ke.knowledge_neurons(model, REQUEST, replace(PARAMS, layers=(1, 3)))
    assert close(some.scores[[1, 3]], every.scores[[1, 3]]) and not some.scores[[0, 2]].any()


def test_without_an_answer_what_the_model_says() -> None:
    model = editable("gpt2")
    ids = words(5, 3, 7, 9, 10)
    token = int(model.hf(torch.tensor([ids])).logits[0, -1].argmax())
    neurons = ke.knowledge_neurons(model, replace(REQUEST, target_true=None), PARAMS)
    assert neurons.said == token and close(neurons.scores, plain_scores(model, ids, [token], PARAMS.steps))


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_each_neuron_says_the_target_once_less_what_is_said_twice(family: str) -> None:
    model = fresh(family)
    embedding = model.hf.get_input_embeddings().weight.detach()
    neurons = ke.knowledge_neurons(model, REQUEST, PARAMS)
    want = embedding[words(20, 23)[-2:]].sum(0) - 2 * embedding[neurons.said]
    edit = ke.kn(model, REQUEST, PARAMS)
    changed = set()
    for name, change in edit.changes.items():
        layer = int(name.split(".")[2])
        rows = change.outputs @ change.inputs.T  # [d_out, d_in]
        changed |= {(layer, int(n)) for n in rows.abs().sum(0).nonzero()}
        assert change.rank == 1 and torch.allclose(rows[:, rows.abs().sum(0) > 0], want[:, None], atol=1e-6)
    assert changed == set(neurons.neurons)


def test_plot(tmp_path) -> None:
    neurons = ke.knowledge_neurons(editable("gpt2"), REQUEST, PARAMS)
    figure = neurons.plot(tmp_path / "neurons.svg")
    assert [bar.get_height() for bar in figure.axes[0].patches] == np.bincount(
        [layer for layer, _ in neurons.neurons], minlength=4
    ).tolist()
    assert (tmp_path / "neurons.svg").stat().st_size


def test_bad_input(monkeypatch) -> None:
    model = fresh("gpt2")
    with pytest.raises(ValueError, match=r"layer 4 is out of range: the model has layers 0\.\.3"):
        ke.knowledge_neurons(model, REQUEST, replace(PARAMS, layers=(4,)))
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        ke.knowledge_neurons(model, REQUEST, PARAMS, ["w1 w2", " "])
    with pytest.raises(ValueError, match="more than the model's 64 positions"):
        ke.knowledge_neurons(model, REQUEST, PARAMS, ["w1 " * 64 + "w2"])
    for name, value in (("steps", 1), ("steps", 10**400), ("adaptive_threshold", 1.0), ("p", -0.1), ("refine", "yes")):
        with pytest.raises(ValueError, match=name):
            ke.KNParams(**{name: value})
    monkeypatch.setattr(kn_module, "_kept", lambda *_: [])
    with pytest.raises(ValueError, match="no neuron is left that 'w31 w32'"):
        ke.kn(model, REQUEST, PARAMS)
    monkeypatch.undo()
    with torch.no_grad():
        model.modules.mlp(2).c_fc.bias[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        ke.knowledge_neurons(model, REQUEST, PARAMS)
