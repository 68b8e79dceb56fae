"""Small packages with the same globals as EasyEdit, rome and memit, written to a folder and imported from there."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

EXECUTE = "def {name}(model, tok, {request}, hparams{more}):\n    return 'their {name}'\n"
STATS = (
    "def layer_stats(model, tokenizer, layer_name, stats_dir, ds_name, to_collect, model_name=None, sample_size=None, "
    "precision=None, batch_tokens=None, download=True, hparams=None):\n    return 'their layer_stats'\n"
)
GENERATE = (
    "def generate_fast(model, tok, prompts, n_gen_per_prompt=1, top_k=5, max_out_len=200):\n    return 'theirs'\n"
)
SCORES = (
    "def test_prediction_acc(model, tok, hparams, prompts, targets, device, locality=False):\n    return 'theirs'\n"
)
EDITOR = """
from ..evaluate.evaluate import test_prediction_acc
from ..models.rome.rome_main import execute_rome
ALG_DICT = {"ROME": lambda *args: execute_rome(*args)}
class BaseEditor:
    def edit_requests(self, requests, sequential_edit=False, verbose=True):
        return [ALG_DICT["ROME"](self.model, self.tok, request, self.hparams) for request in requests]
"""

EASYEDIT = {
    "easyeditor/models/rome/rome_main.py": "from ...util.generate import generate_fast\n"
    "from .layer_stats import layer_stats\n" + EXECUTE.format(name="execute_rome", request="request", more=""),
    "easyeditor/models/rome/layer_stats.py": STATS,
    "easyeditor/models/r_rome/r_rome_main.py": EXECUTE.format(name="execute_r_rome", request="request", more=""),
    "easyeditor/models/memit/memit_main.py": "from ..rome.layer_stats import layer_stats\n"
    + EXECUTE.format(name="execute_memit", request="requests", more=", cache_template=None"),
    "easyeditor/models/ft/ft_main.py": EXECUTE.format(name="execute_ft", request="requests", more=", **kwargs"),
    **{
        f"easyeditor/models/{folder}/{file}.py": "from ..rome.layer_stats import layer_stats\n"
        + EXECUTE.format(name=name, request="requests", more=", cache_template=None")
        for folder, file, name in (
            ("emmet", "emmet_main", "execute_emmet"),
            ("alphaedit", "AlphaEdit_main", "execute_AlphaEdit"),
            ("pmet", "pmet_main", "execute_pmet"),
        )
    },
    "easyeditor/util/generate.py": GENERATE,
    "easyeditor/evaluate/evaluate.py": SCORES,
    "easyeditor/editors/editor.py": EDITOR,
    "easyeditor/__init__.py": "from .editors import editor\n",
}
ROME = {
    "rome/__init__.py": "from . import rome_main\n",
    "rome/rome_main.py": "from util.generate import generate_fast\nfrom .layer_stats import layer_stats\n"
    + EXECUTE.format(name="execute_rome", request="request", more=""),
    "rome/layer_stats.py": STATS,
    "baselines/ft/ft_main.py": EXECUTE.format(name="execute_ft", request="requests", more=", **kwargs"),
    "util/generate.py": GENERATE,
    "experiments/py/eval_utils_counterfact.py": "def test_batch_prediction(model, tok, prefixes, target_new, "
    "target_true):\n    return 'theirs'\n",
}


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for parent in file.relative_to(folder).parents:
            if parent.parts:
                (folder / parent / "__init__.py").touch()


def without(files: Mapping[str, str], name: str, function: str) -> dict[str, str]:
    """The same files, `function` renamed in one."""
    assert f"def {function}(" in files[name]
    return dict(files) | {name: files[name].replace(f"def {function}(", f"def {function}_(")}


def forget(packages: tuple[str, ...]) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """On sys.path, with none of the libraries imported; afterwards nothing is left of them."""
    from knowedit_ext.compat import easyedit, rome

    packages = (*easyedit.BACKEND.packages, *rome.BACKEND.packages)
    monkeypatch.syspath_prepend(tmp_path)
    forget(packages)
    yield tmp_path
    easyedit.uninstall()
    rome.uninstall()
    forget(packages)
