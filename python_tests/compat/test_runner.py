"""`python -m knowedit_ext.compat.easyedit script.py` and `.compat.rome`, over small packages that stand for theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import fakes
from .clones import run

EASYEDIT = ["-m", "knowedit_ext.compat.easyedit"]
ROME = ["-m", "knowedit_ext.compat.rome"]

# Says what it was given and met, and at the very end, when the runner is through, whether all is as it was.
SCRIPT = """
import atexit, json, sys
import torch
import beside  # of the script's own folder
seen = {"argv": sys.argv, "name": __name__, "file": __file__, "beside": beside.HERE}
import easyeditor
from easyeditor.models.rome import rome_main
from easyeditor.models.memit.memit_main import execute_memit
seen["ours"] = [hasattr(f, "_knowedit_backend") for f in (rome_main.execute_rome, rome_main.layer_stats, execute_memit)]
seen["cuda"] = [str(torch.zeros(1, device="cuda").device), str(torch.ones(1).cuda().device)]
import transformers.modeling_attn_mask_utils

@atexit.register
def end():
    modules = {n: vars(m) for n, m in sys.modules.items() if n.split(".")[0] == "easyeditor"}
    ours = [(n, k) for n, values in modules.items() for k, v in values.items() if hasattr(v, "_knowedit_backend")]
    seen["left"] = ours + [n for n, v in vars(easyeditor.editor.BaseEditor).items() if hasattr(v, "_knowedit_backend")]
    seen["theirs"] = rome_main.execute_rome(0, 0, 0, 0)
    json.dump(seen, open("seen.json", "w"))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The libraries in the folder that is run in; the script in another."""
    fakes.write(tmp_path, fakes.EASYEDIT)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "beside.py").write_text("HERE = __file__\n")
    return tmp_path


def test_a_script_runs_as_it_would_alone(place) -> None:
    (place / "mine" / "script.py").write_text(SCRIPT)
    done = run([*EASYEDIT, "mine/script.py", "--edits", "3", "-m"], place)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads((place / "seen.json").read_text())
    assert seen["argv"] == ["mine/script.py", "--edits", "3", "-m"]
    assert seen["name"] == "__main__" and seen["file"] == "mine/script.py"
    assert Path(seen["beside"]) == place / "mine" / "beside.py"
    assert seen["ours"] == [True] * 3 and seen["cuda"] == ["cpu", "cpu"]
    assert seen["left"] == [] and seen["theirs"] == "their execute_rome"


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no data')", 1, "no data"),
        ("import easyeditor\nraise KeyError('mine')", 1, "KeyError: 'mine'"),
        ("def broken(:", 1, "SyntaxError"),
        ("import nowhere_at_all", 1, "No module named 'nowhere_at_all'"),
    ],
)
def test_a_script_ends_in_its_own_way(place, text, code, says) -> None:
    (place / "mine" / "script.py").write_text(text)
    done = run([*EASYEDIT, "mine/script.py"], place)
    assert done.returncode == code and says in done.stderr, done.stderr[-2000:]
    assert says == "" or "script.py" in done.stderr or text.startswith("import sys")


def test_a_script_without_the_library(place) -> None:
    """Nothing of it is imported by us."""
    (place / "mine" / "script.py").write_text(
        "import sys\nassert not any(n.startswith('easyeditor') for n in sys.modules)\nprint('alone')"
    )
    done = run([*EASYEDIT, "mine/script.py"], place)
    assert done.returncode == 0 and done.stdout.strip() == "alone", done.stderr[-2000:]


def test_a_module_by_name(place) -> None:
    fakes.write(
        place,
        {
            "runs/edit_all.py": "import sys\nfrom easyeditor.models.ft import ft_main\n"
            "print(__name__, sys.argv[1:], hasattr(ft_main.execute_ft, '_knowedit_backend'))\n"
        },
    )
    done = run([*EASYEDIT, "-m", "runs.edit_all", "a", "b"], place)
    assert done.stdout.strip() == "__main__ ['a', 'b'] True", done.stderr[-2000:]


def test_what_has_moved_is_named(place) -> None:
    fakes.write(place, fakes.without(fakes.EASYEDIT, "easyeditor/models/ft/ft_main.py", "execute_ft"))
    (place / "mine" / "script.py").write_text("from easyeditor.models.ft import ft_main\n")
    done = run([*EASYEDIT, "mine/script.py"], place)
    assert done.returncode == 1
    assert "MovedError" in done.stderr and "easyeditor.models.ft.ft_main.execute_ft(" in done.stderr


TRACE = """
def calculate_hidden_flow(mt, prompt, subject, samples=10, noise=0.1, token_range=None, uniform_noise=False,
                          replace=False, window=10, kind=None, expect=None):
    return "theirs"
def main():
    import sys
    print("main", sys.argv[1:], hasattr(calculate_hidden_flow, "_knowedit_backend"))
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("how", [["experiments/causal_trace.py"], ["-m", "experiments.causal_trace"]], ids=" ".join)
def test_a_script_that_is_itself_a_module_with_functions_of_ours(tmp_path, how) -> None:
    fakes.write(tmp_path, fakes.ROME | {"experiments/causal_trace.py": TRACE})
    done = run([*ROME, *how, "--model", "x"], tmp_path)
    assert done.stdout.strip() == "main ['--model', 'x'] True", done.stderr[-2000:]


def test_evaluation_of_rome(tmp_path) -> None:
    text = (
        "from rome.rome_main import execute_rome\nfrom experiments.py.eval_utils_counterfact import "
        "test_batch_prediction\nprint([hasattr(f, '_knowedit_backend') for f in (execute_rome, test_batch_prediction)])"
    )
    fakes.write(tmp_path, fakes.ROME | {"experiments/evaluate.py": text})
    done = run([*ROME, "-m", "experiments.evaluate"], tmp_path)
    assert done.stdout.strip() == "[True, True]", done.stderr[-2000:]
