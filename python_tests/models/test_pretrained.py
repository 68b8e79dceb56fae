"""Checkpoints that are not there, damaged or of another kind, devices and types that are none: a line that says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import knowedit_ext as ke
from knowedit_ext.world import load_world

from ..support.families import FAMILIES, tiny_hf
from ..support.tokenizers import word_level


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(load_world().folder, tmp_path / "model"))


def config(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return apply


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return apply


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: shutil.rmtree(folder), "there is no folder '.*model'"),
        (lambda folder: (folder / "config.json").unlink(), "model' holds no model: there is no config.json"),
        (written("config.json", b"{"), "config.json' is not JSON"),
        (written("config.json", b"\xff\xfe{}"), "config.json' is not JSON: 'utf-8'"),
        (written("config.json", b"[]"), "config.json' holds no object"),
        (written("config.json", b"{}"), "config.json' holds the model type None"),
        (config(lambda settings: settings | {"model_type": "zzz"}), "holds the model type 'zzz', which the installed"),
        (config(lambda settings: settings | {"n_head": 7}), "cannot load the weights of the model in '.*model'"),
        (config(lambda settings: settings | {"n_layer": 7}), r"lacks transformer.h.6.*\(and 10 more weights\)"),
        (
            config(lambda settings: settings | {"n_embd": 320}),
            r"c_attn.bias as \[480\], not \[960\] as its config.json says",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load the weights of the model in '.*model'"),
        (cut, "cannot load the weights of the model in '.*model': .*incomplete"),
        (written("model.safetensors", b"x" * 1000), "cannot load the weights of the model in '.*model'"),
        (without("transformer.h.2.mlp.c_fc.weight"), "model' lacks transformer.h.2.mlp.c_fc.weight: it is damaged"),
        (written("tokenizer.json", b"{"), "cannot load the tokenizer of the model in '.*model'"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load the tokenizer of the model in '.*model'"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "tokenizer of '.*model' has no words"),
    ],
)
def test_damaged_folders(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message) as raised:
        ke.load_model(folder)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "the model's name is empty"),
        ("./absent", "there is no folder './absent'"),
        ("a/b/c", "there is no folder 'a/b/c'"),
        ("absent", "'absent', which is no folder here, from the Hugging Face hub: .*connect"),
        ("some/body", "'some/body', which is no folder here"),
        ("a b", "'a b', which is no folder here"),
        ("file", "'file' is a file: expected the folder"),
    ],
)
def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch, name: str, message: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message):
        ke.load_model(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_checkpoints_of_every_family_load(tmp_path: Path, family: str) -> None:
    hf = tiny_hf(family)
    hf.save_pretrained(tmp_path)
    word_level().save_pretrained(tmp_path)
    loaded = ke.load_model(tmp_path).hf
    for name, weight in hf.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    with torch.no_grad():  # and compute the same: nothing left out by another attention
        want, got = (model(torch.tensor([[3, 4, 5, 6, 7, 8]])).logits for model in (hf, loaded))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


DEVICES = [
    ("gpu", "unknown device 'gpu'"),
    ("", "unknown device ''"),
    (True, "device is True: expected text or device"),
    (1.5, "device is 1.5: expected text or device"),
    ("cuda:99", "device 'cuda:99'"),
    ("hpu", "device 'hpu'.* cannot be used here"),
]


@pytest.mark.parametrize("device, message", DEVICES)
def test_devices_that_are_none(device, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ke.load_model("not even looked for", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_cuda() -> None:
    with pytest.raises(ValueError, match="device 'cuda': .*'cpu' always works"):
        ke.load_model("not even looked for", device="cuda")


@pytest.mark.parametrize("dtype", ["gpu", "int8", "", "nn", 3, True, torch.int64])
def test_types_that_are_none(dtype) -> None:
    with pytest.raises((ValueError, TypeError), match="unknown dtype .*'bfloat16'|dtype is .*: expected text or dtype"):
        ke.load_model("not even looked for", dtype=dtype)
