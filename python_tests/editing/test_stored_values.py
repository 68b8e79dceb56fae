"""Values kept in a folder: the same as without one, gone on with, enlarged, shared by ranks, refused for others."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.editing import values as values_module
from knowedit_ext.editing.methods import METHODS
from knowedit_ext.editing.methods.memit import memit_values
from knowedit_ext.editing.tokenized import tokenize_requests
from knowedit_ext.editing.values import edits_at_once, optimise_values
from knowedit_ext.runs.files import write_npz
from knowedit_ext.world import load_world

from ..support.forked import knowedit
from ..support.processes import finish, fork, hashes, kill_at
from .models import editable
from .plain import moments_of
from .test_memit import GROUPS, LAYERS, REQUESTS

KEEPING = [name for name, method in METHODS.items() if method.takes("store")]
COMMON = dict(layers=LAYERS, v_num_grad_steps=6)
MORE = {"alphaedit": dict(nullspace_share=0.2), "encore": dict(prob_cutoff=-2), "pmet": dict(clamp_norm_factor=9.0)}
MANY = [ke.EditRequest(f"w{n} {{}} w9", f"w{n + 1} w7", f"w{n + 20}") for n in range(7)]
SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
import knowedit_ext as ke
from knowedit_ext.world import load_world
from knowedit_ext.editing.methods.memit import MEMITParams, memit_values
world = load_world()
model = ke.load_model(world.folder, dtype="float32")
print("loaded", flush=True)
requests = [ke.EditRequest.of(record) for record in world.records()[:7]]
memit_values(model, requests, MEMITParams.preset("world"), contexts=[["{}"]], batch=2, store=sys.argv[1])
"""


def params_of(name: str) -> object:
    return METHODS[name].params(**(COMMON | MORE.get(name, {})))


def values_of(model: ke.EditableModel, requests=MANY, store: Path | None = None, **options) -> torch.Tensor:
    return memit_values(
        model, requests, params_of("memit"), **({"contexts": GROUPS, "batch": 2} | options), store=store
    )


def test_who_keeps_values() -> None:
    assert {"memit", "alphaedit", "emmet", "pmet", "encore"} <= set(KEEPING)


@pytest.mark.parametrize("name", KEEPING)
def test_the_edit_is_the_one_without_a_folder(name: str, tmp_path: Path) -> None:
    """ENCORE's rule counts by an edit's number: groups are optimised by themselves, and keep them."""
    model = editable("gpt2")
    options = dict(contexts=GROUPS, batch=2)
    plain = ke.edit(model, REQUESTS, name, params=params_of(name), moments=moments_of(model, LAYERS), **options)
    for _ in range(2):  # computed, then read
        kept = ke.edit(
            model, REQUESTS, name, params=params_of(name), moments=moments_of(model, LAYERS), store=tmp_path, **options
        )
        for weight in plain.changes:
            assert torch.equal(kept.delta(weight), plain.delta(weight))
    assert len(list((tmp_path / "values").iterdir())) == len(REQUESTS)


def test_only_what_is_not_there_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = editable("llama")
    whole = values_of(model, store=tmp_path)
    before = hashes(tmp_path)
    for gone in ("000002.npz", "000006.npz"):
        (tmp_path / "values" / gone).unlink()
    computed = []
    import knowedit_ext.editing.closed_form as module

    plain = module.optimise_values
    monkeypatch.setattr(
        module, "optimise_values", lambda m, part, *a, **o: computed.append(len(part)) or plain(m, part, *a, **o)
    )
    assert torch.equal(values_of(model, store=tmp_path), whole)
    assert computed == [2, 1] and hashes(tmp_path) == before
    assert torch.equal(values_of(model, MANY[:4], store=tmp_path), whole[:4])  # fewer are served
    assert computed == [2, 1]


def test_more_requests_join(tmp_path: Path) -> None:
    model = editable("gpt2")
    values_of(model, MANY[:5], tmp_path / "grown")  # a last group of one
    grown, whole = (values_of(model, store=tmp_path / name) for name in ("grown", "whole"))
    assert torch.equal(grown, whole) and hashes(tmp_path / "grown") == hashes(tmp_path / "whole")
    assert torch.equal(whole, values_of(model))


def test_the_group_is_the_memory_s_or_the_folder_s(tmp_path: Path) -> None:
    model = editable("gpt2")
    first = values_of(model, store=tmp_path, batch=3)
    assert torch.equal(values_of(model, store=tmp_path, batch=None), first)  # goes on with threes
    with pytest.raises(ValueError, match="group: 3 there, 4 asked"):
        values_of(model, store=tmp_path, batch=4)
    assert torch.allclose(values_of(model, batch=None), first, atol=1e-5)


@pytest.mark.parametrize("what", ["request", "params", "contexts", "weights", "method", "order"])
def test_values_of_something_else_are_refused(what: str, tmp_path: Path) -> None:
    model = editable("gpt2")
    values_of(model, store=tmp_path)
    before = hashes(tmp_path)
    requests, params, contexts = list(MANY), params_of("memit"), GROUPS
    if what == "request":
        requests[3] = replace(requests[3], target_new="w50")
    if what == "order":
        requests[3], requests[4] = requests[4], requests[3]
    if what == "params":
        params = replace(params, v_lr=0.4)
    if what == "contexts":
        contexts = [["{}"]]
    if what == "weights":
        model.hf.transformer.h[0].mlp.c_fc.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="holds results made with other settings"):
        if what == "method":
            pmet = params_of("pmet")
            ke.edit(
                model,
                MANY,
                "pmet",
                params=pmet,
                moments=moments_of(model, LAYERS),
                contexts=GROUPS,
                batch=2,
                store=tmp_path,
            )
        else:
            memit_values(model, requests, params, contexts=contexts, batch=2, store=tmp_path)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("content", ["nan", "width", "altered", "half"])
def test_damaged_values_are_told_by_name(content: str, tmp_path: Path) -> None:
    model = editable("gpt2")
    whole = values_of(model, store=tmp_path)
    path = tmp_path / "values" / "000001.npz"
    if content == "half":
        path.write_bytes(path.read_bytes()[:100])
    elif content == "altered":
        raw = bytearray(path.read_bytes())
        at = raw.index(whole[1].numpy().tobytes()[:8])
        raw[at] ^= 1
        path.write_bytes(raw)
    else:
        write_npz(path, {"v_star": np.full(3 if content == "width" else model.hidden_size, np.nan, np.float32)})
    with pytest.raises(ValueError, match="000001.npz"):
        values_of(model, store=tmp_path)
    path.unlink()
    assert torch.equal(values_of(model, store=tmp_path), whole)


def test_given_values_are_not_kept(tmp_path: Path) -> None:
    model = editable("gpt2")
    params, moments = params_of("memit"), moments_of(model, LAYERS)
    with pytest.raises(ValueError, match="values= or store="):
        ke.memit(model, REQUESTS, params, moments, contexts=GROUPS, values=torch.zeros(3, 1), store=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_how_many_at_once_is_what_optimise_values_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = editable("gpt2"), []
    tokenized = tokenize_requests(model, MANY, ["{}"], "subject_last")
    monkeypatch.setattr(values_module, "_batch_size", lambda model, prompts, layers: sizes.append(layers) or 3)
    assert edits_at_once(model, tokenized, params_of("memit"), 2) == 3
    optimise_values(model, tokenized, params_of("memit"), "layer", 2)
    assert sizes[0] == sizes[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("values") / "whole"
    finish(fork(SCRIPT, out))
    return out


def test_killed_and_gone_on_with(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for files in (1, 4):
        kill_at(fork(SCRIPT, out), out, "values/*.npz", files)
    finish(fork(SCRIPT, out))
    assert hashes(out) == hashes(whole)


def test_two_ranks_give_the_same(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finish(fork(SCRIPT, out, ranks=2))
    assert hashes(out) == hashes(whole)


def test_the_command_shares_requests_among_ranks(tmp_path: Path) -> None:
    """Each rank a share, however many could be optimised at once; one file, to rounding that of one process."""
    (tmp_path / "facts.json").write_text(json.dumps(load_world().records()[:5]))
    model, layers = ke.load_model(load_world().folder, dtype="float32"), METHODS["memit"].params.preset("world").layers
    ke.collect_moments(model, load_world().statements()[:300], layers, out=tmp_path / "moments", progress=False)
    edit = ["edit", "world", "--params", "world", "--requests", "facts.json", "--moments", "moments"]
    assert knowedit(*edit, "--store", "values_one", "--out", "one.safetensors", cwd=tmp_path).returncode == 0
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "knowedit_ext", *edit]
    command += ["--store", "values_two", "--out", "two.safetensors"]
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True)
    one, two = (ke.Edit.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert json.loads((tmp_path / "values_two" / "settings.json").read_text())["group"] == 3
    for name in one.changes:
        assert (one.delta(name) - two.delta(name)).norm() <= 1e-5 * one.delta(name).norm()
