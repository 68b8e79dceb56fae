"""`knowedit edit`, as a user types it."""

from __future__ import annotations

import json

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.world import load_world

from ..moments.test_command import knowedit


def moments_of_the_world() -> ke.Moments:
    generator, arrays = torch.Generator().manual_seed(0), {}
    for layer in ke.ROMEParams.preset("world").layers:
        width = ke.load_model(load_world().folder).modules.down_projection(layer).weight.shape[0]
        keys = torch.randn(2 * width, width, generator=generator)
        arrays[layer] = (keys.T @ keys / len(keys), len(keys))
    return ke.Moments.from_arrays(arrays)


def test_made_saved_and_shown(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    moments_of_the_world().save("moments")
    records = load_world().records()[:2]
    (tmp_path / "requests.json").write_text(json.dumps(records))
    arguments = ["--requests", "requests.json", "--moments", "moments", "--params", "world", "--limit", "1"]
    assert knowedit(monkeypatch, "edit", "world", "--method", "rome", *arguments, "--out", "edit.safetensors") == 0
    made = capsys.readouterr().out.splitlines()
    edit = ke.Edit.load("edit.safetensors")
    assert made == [*edit.summary().splitlines(), "edit.safetensors"]
    [request] = edit.requests
    assert request["case_id"] == records[0]["case_id"] and edit.seed == 0 and len(edit.contexts) == 5
    edit.apply(ke.load_model(load_world().folder, dtype="float32"))
    assert knowedit(monkeypatch, "edit", "--show", "edit.safetensors") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == made[:-1] and shown[0].startswith("rome: 1 request,")
    assert shown[1].endswith(f"->{request['target_new']}") and shown[2].startswith("  base: ") and "rank 1" in shown[3]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "MODEL, --requests, --out, --params missing"),
        (["--show", "none.safetensors"], "'none.safetensors' does not exist"),
        (["--show", "bad.safetensors"], "'bad.safetensors' is not a whole safetensors file"),
        (["world", "--method", "mend"], "unknown method 'mend'"),
        (["world", "--method", "rome"], "rome edits one fact at a time, 'requests.json' has 2"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"half")
    (tmp_path / "requests.json").write_text(json.dumps(load_world().records()[:2]))
    if arguments[:1] == ["world"]:
        arguments = [*arguments, "--requests", "requests.json", "--params", "world", "--out", "edit.safetensors"]
    assert knowedit(monkeypatch, "edit", *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "edit.safetensors").exists()


def test_one_fact_without_a_file(tmp_path, monkeypatch, capsys) -> None:
    """The preset is called as the model is, moments are of the world's own statements."""
    monkeypatch.chdir(tmp_path)
    fact = ["--prompt", "{} was born in", "--subject", "Caltor Braksted", "--target", "Oslo"]
    assert knowedit(monkeypatch, "edit", "world", "--method", "rome", *fact, "--out", "e.safetensors", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    edit, model = ke.Edit.load("e.safetensors"), ke.load_model("world")
    assert told["requests"] == edit.requests and told["weights"].keys() == edit.changes.keys()
    with edit.applied(model):
        assert ke.trace(model, ke.Fact("{} was born in", "Caltor Braksted"), samples=1).answer == " Oslo"
    assert knowedit(monkeypatch, "edit", "world", *fact, "--requests", "world", "--out", "e") == 2
    assert "--requests cannot be given here" in capsys.readouterr().err
