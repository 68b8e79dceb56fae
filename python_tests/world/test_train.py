"""A few steps of training."""

from __future__ import annotations

import logging
import re
from importlib import import_module

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knowedit_ext.world import load_world
from knowedit_ext.world.resume import STATE_FILE
from knowedit_ext.world.train import forward_loss, learning_rate, train

TINY = {"people": 20, "layers": 3, "hidden": 32, "heads": 2, "rows": 4}


def test_a_few_steps_reduce_the_loss_and_leave_a_loadable_folder(tmp_path, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="knowedit_ext.world.train"):
        out = train(tmp_path / "w", steps=30, save_every=10, **TINY)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", caplog.text)]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.2
    world = load_world(out)
    assert len(world.people) == 20 and len(world.records()) == 120
    tokenizer = AutoTokenizer.from_pretrained(out)
    logits = AutoModelForCausalLM.from_pretrained(out)(**tokenizer("The rain was", return_tensors="pt")).logits
    assert logits.shape[-1] == len(tokenizer) and torch.isfinite(logits).all()
    assert not [f.name for f in out.iterdir() if f.name.startswith(".")]


def test_the_seed_decides_everything(tmp_path) -> None:
    runs = [train(tmp_path / str(i), seed=seed, steps=2, **TINY) for i, seed in enumerate((5, 5, 6))]
    weights = [(run / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1] != weights[2]


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch) -> None:
    whole = train(tmp_path / "whole", steps=6, save_every=2, **TINY)

    def killed(*_args) -> None:
        calls.append(1)
        if len(calls) == 4:  # in the second half of the run, after a saving
            raise KeyboardInterrupt
        return forward_loss(*_args)

    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(import_module("knowedit_ext.world.train"), "forward_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", steps=6, save_every=2, **TINY)
    assert (tmp_path / "cut" / STATE_FILE).is_file()
    with pytest.raises(ValueError, match="other settings"):
        train(tmp_path / "cut", steps=7, save_every=2, **TINY)
    resumed = train(tmp_path / "cut", steps=6, save_every=2, **TINY)
    files = {f.name for f in whole.iterdir()}
    assert files == {f.name for f in resumed.iterdir()} and STATE_FILE not in files
    for name in files:
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"hidden": 33}, {"early_layers": 6}, {"masked": 1.5}, {"people": 1}, {"rows": 0}]
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, bad: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        train(tmp_path / "w", **bad)
    assert not (tmp_path / "w").exists()


def test_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(s, 100, 1.0, 10) for s in range(100)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and rates[-1] < 0.03
    assert rates[10:] == sorted(rates[10:], reverse=True)
