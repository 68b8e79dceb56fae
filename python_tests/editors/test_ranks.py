"""Two ranks of a torchrun train what one process trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import knowedit_ext as ke
from knowedit_ext.world import load_world

from ..support.processes import finish, fork

SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import knowedit_ext as ke
from knowedit_ext.world import load_world
world, out = load_world(), Path(sys.argv[1])
model = ke.load_model(world.folder, dtype="float32")
params = ke.EditorTrainingParams(iterations=9, val_interval=4, val_edits=3, accumulate_bs=3, lr=1e-3, lr_lr=1e-3)
last = [model.num_layers - 2, model.num_layers - 1]
editors = {"mend": ke.MEND.new(model, last, rank=4), "efk": ke.EFK.new(model, last, hidden=5, condition=6)}
for name, editor in editors.items():
    ke.train_editor(model, editor, world.records()[:12], world.statements()[:30], params, out / name)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("ranks")
    for name, ranks in (("one", 1), ("two", 2)):
        (base / name).mkdir()
        finish(fork(SCRIPT, base / name / "out", ranks))
    return base / "one" / "out", base / "two" / "out"


@pytest.mark.parametrize("kind", ["mend", "efk"])
def test_two_ranks_come_to_the_same(folders: tuple[Path, Path], kind: str) -> None:
    one, two = (folder / kind for folder in folders)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    logs = [json.loads((folder / "validation.json").read_text()) for folder in (one, two)]
    assert [row["iteration"] for row in logs[0]] == [0, 4, 8, 9]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        assert all(b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6) for key in a)
    for name in ("editor.safetensors", "training.safetensors"):
        want, got = (load_file(folder / name) for folder in (one, two))
        assert want.keys() == got.keys()
        for key, x in want.items():
            rounding = 1e-6 if name == "editor.safetensors" or key.startswith("editor.") else 1e-4  # gradients cancel
            assert torch.allclose(got[key], x, rtol=rounding, atol=rounding), key


def test_the_editor_is_one_of_the_model(folders: tuple[Path, Path]) -> None:
    model = ke.load_model(load_world().folder, dtype="float32")
    editor = ke.MEND.load(folders[1] / "mend" / "editor.safetensors", model)
    assert all(torch.isfinite(x).all() for x in editor.tensors.values())
    assert ke.mend(model, load_world().records()[20], editor).changes
