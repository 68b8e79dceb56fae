"""`knowedit train-editor` and `knowedit convert-editor`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

import knowedit_ext as ke
from knowedit_ext.world import load_world

from ..editing.models import fresh
from ..moments.test_command import knowedit
from .models import REQUESTS, efk_editor, mend_editor

BRIEF = dict(val_interval=2, val_edits=2, accumulate_bs=2, lr_lr=1e-3)


def write_inputs() -> None:
    Path("records.json").write_text(json.dumps(load_world().records()[:8]))
    Path("texts.txt").write_text("\n".join(load_world().statements()[:30]))
    Path("brief.json").write_text(json.dumps(BRIEF))


@pytest.mark.parametrize("method", ["mend", "efk"])
@pytest.mark.parametrize("data", ["records.json", "texts.txt"])
def test_trained_and_used(method: str, data: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs()
    told = ["--texts", "texts.txt", "--out", "o", "--params", "brief.json", "--iterations", "3", "--layers", "2-3"]
    arguments = ["train-editor", "world", "--method", method, "--data", data, "--limit", "8", "--rank", "4", *told]
    assert knowedit(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out.splitlines() == [str(Path("o") / "editor.safetensors")]
    model = ke.load_model(load_world().folder, dtype="float32")
    record = load_world().records()[20]
    if method == "mend":
        edit = ke.mend(model, record, ke.MEND.load("o/editor.safetensors", model))
    else:
        edit = ke.efk(model, record, ke.EFK.load("o/editor.safetensors", model))
    assert {int(name.split(".")[2]) for name in edit.changes} == {2, 3}
    assert knowedit(monkeypatch, *arguments, "--seed", "1") == 2  # the folder is another training's
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mend", "efk"])
def test_converted(kind: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    model = fresh("gpt2")
    editor = {"mend": mend_editor, "efk": efk_editor}[kind](model, layers=(1, 2, 3))
    config = GPT2Config(n_layer=4, n_embd=32, n_head=4, vocab_size=60)
    torch.save({"model": {**editor.tensors, "model_config": config}, "opt": {}, "step": 1}, "a.pt")
    assert knowedit(monkeypatch, "convert-editor", "a.pt", "e.safetensors") == 0
    said, written = capsys.readouterr().out.splitlines()
    assert said.startswith(f"{kind} editor of [") and "h.3.mlp.c_fc" in said and written == "e.safetensors"
    if kind == "mend":
        (one, other) = (ke.mend(model, REQUESTS, x) for x in (editor, ke.MEND.load("e.safetensors", model)))
    else:
        (one, other) = (ke.efk(model, REQUESTS[0], x) for x in (editor, ke.EFK.load("e.safetensors", model)))
    assert all(torch.equal(one.delta(name), other.delta(name)) for name in one.changes)
    Path("none.pt").write_bytes(b"nothing")
    assert knowedit(monkeypatch, "convert-editor", "none.pt", "n.safetensors") == 2
    assert "is no archive" in capsys.readouterr().err and not Path("n.safetensors").exists()
