"""What the libraries need around them: a folder to run in, and empty modules for what is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFORMANCE = Path(os.environ.get("KNOWEDIT_SHARED") or ROOT.parent / "shared") / "conformance"
MODEL = "gpt2-tiny"

# sitecustomize.py of the processes: Python runs it before anything else
ABSENT = '''
import sys, types
from importlib.machinery import ModuleSpec

import transformers.modeling_utils  # looks for some of them by itself


class Absent:
    packages = """allennlp hydra einops datasets higher omegaconf pandas openai rouge zhipuai iopath torchvision timm
    fairscale cv2 av qwen_vl_utils sentence_transformers""".split()

    class Module(types.ModuleType):
        __path__ = []

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            members = {"__init__": lambda self, *a, **k: None, "__class_getitem__": classmethod(lambda c, k: c)}
            return type(name, (), members)

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return ModuleSpec(name, cls, is_package=True) if name.split(".")[0] in cls.packages else None

    @classmethod
    def create_module(cls, spec):
        return cls.Module(spec.name)

    @classmethod
    def exec_module(cls, module):
        pass


sys.meta_path.append(Absent)
'''


def clone(library: str) -> Path:
    """The folder that KNOWEDIT_EASYEDIT, KNOWEDIT_ROME, KNOWEDIT_MEMIT name; skips without it."""
    variable = f"KNOWEDIT_{library.upper()}"
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no clone of {library}")
    if not CONFORMANCE.is_dir():
        pytest.skip(f"no vectors at {CONFORMANCE}; KNOWEDIT_SHARED names another folder")
    return Path(os.environ[variable]).resolve()


def write_folder(folder: Path, given: dict[str, Any]) -> None:
    """The model, its statistics, and what rome and memit look for from `folder`: globals.yml, records, parameters."""
    shutil.copytree(CONFORMANCE / "vectors" / "model", folder / MODEL)
    names = {name: name.lower() for name in ("RESULTS", "DATA", "KV", "HPARAMS", "STATS")}
    lines = [f'{name}_DIR: "{place}"' for name, place in names.items()]
    (folder / "globals.yml").write_text("\n".join([*lines, 'REMOTE_ROOT_URL: "file:///nowhere"']))
    (folder / "data").mkdir()
    for name in ("counterfact.json", "multi_counterfact.json"):
        (folder / "data" / name).write_text(json.dumps(given.get("records")))
    for algorithm, values in given.get("hparams", {}).items():
        (folder / "hparams" / algorithm).mkdir(parents=True)
        (folder / "hparams" / algorithm / f"{MODEL}.json").write_text(json.dumps(values))
        if algorithm == "FT":  # the demo's
            free = values | {"norm_constraint": False}
            (folder / "hparams" / algorithm / f"{MODEL}_unconstr.json").write_text(json.dumps(free))
    arrays = np.load(CONFORMANCE / "vectors" / "rome.npz")
    counts = json.loads((CONFORMANCE / "vectors" / "rome.json").read_text())["moment_counts"]
    stats = folder / "stats" / MODEL / "wikipedia_stats"
    stats.mkdir(parents=True)
    for layer, count in ((n, c) for n, c in counts.items() if f"moment_{n}" in arrays):
        total = (arrays[f"moment_{layer}"].astype(np.float64) * count).astype(np.float32)
        named = {"mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": count, "mom2.mom2": total}
        np.savez(stats / f"transformer.h.{layer}.mlp.c_proj_float32_mom2_300.npz", **named, sample_size=300)
    (folder / "given.json").write_text(json.dumps(given))


def run(command: list[str], folder: Path, *paths: Path) -> subprocess.CompletedProcess:
    """A command of this Python in `folder`, with `paths`, the package and the empty modules to import from."""
    (folder / "stubs").mkdir(exist_ok=True)
    (folder / "stubs" / "sitecustomize.py").write_text(ABSENT)
    more = [Path(part) for part in os.environ.get("KNOWEDIT_UPSTREAM_DEPS", "").split(os.pathsep) if part]
    places = os.pathsep.join(str(path) for path in (folder / "stubs", *paths, ROOT, *more))
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": places, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
