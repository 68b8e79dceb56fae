"""The public names, and the packages they come from."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import knowedit_ext as ke
from knowedit_ext.studies.check_edit import Measure

PACKAGES = ("model", "tracing", "evaluation", "editing", "editors", "moments", "datasets", "studies", "world")


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_give_what_they_say(name: str) -> None:
    package = importlib.import_module(f"knowedit_ext.{name}")
    assert package.__all__ and all(hasattr(package, public) for public in package.__all__)


def test_a_function_is_not_hidden_by_the_file_it_is_in() -> None:
    from knowedit_ext.datasets import download
    from knowedit_ext.editing import edit
    from knowedit_ext.evaluation import evaluate
    from knowedit_ext.evaluation.evaluate import load  # and what else is in the file can be had
    from knowedit_ext.tracing import trace
    from knowedit_ext.tracing.trace import Trace

    assert (edit, evaluate, trace, Trace) == (ke.edit, ke.evaluate, ke.trace, ke.Trace)
    assert callable(download) and callable(load)


def test_every_public_name_comes_from_a_package_that_gives_it() -> None:
    given = {public for name in PACKAGES for public in importlib.import_module(f"knowedit_ext.{name}").__all__}
    assert set(ke.__all__) <= given


RESULTS = {
    "KnockoutTrace(subject, ->' a', 9 tokens x 99 layers, clean 0.5)": lambda: ke.KnockoutTrace(
        {"subject": np.zeros(99, np.float32)}, 0.5, {"subject": (0, 1)}, " a", (1,), ("w",) * 9, (0, 2), 3
    ),
    "KnowledgeNeurons(->' a', 1 of 4 x 50, 2 prompts)": lambda: ke.KnowledgeNeurons(
        np.zeros((2, 4, 50), np.float32), [[(0, n) for n in range(50)]], [(0, 1)], " a", 1
    ),
    "EditCheck(yellow: efficacy green, norm yellow)": lambda: ke.EditCheck(
        (Measure("efficacy", 0.0, 1.0, "green", "as asked"), Measure("norm", 1.0, 2.0, "yellow", "norm: +100 %"))
    ),
    "Ability(perplexity; before and after)": lambda: ke.Ability({"perplexity": {"a": 1.0}}, {"perplexity": {"a": 2.0}}),
    "Suggestion(memit, 7 of 60 candidates, layers [1, 2])": lambda: ke.Suggestion(
        ke.MEMITParams(layers=(1, 2)), "memit", [{"S": 1.0}] * 99, [], None, None, 7, 60, 1.0, {}, []
    ),
}


@pytest.mark.parametrize("shown", RESULTS)
def test_a_result_shows_itself_in_a_line(shown: str) -> None:
    assert repr(RESULTS[shown]()) == shown


ALONE = """
import importlib, sys, types

def loaded():
    return {m for m in sys.modules if m.startswith("knowedit_ext.") and ".ops" not in m}

def forget(modules):
    for module in sorted(modules, reverse=True):  # what is in a package before the package
        package, _, name = module.rpartition(".")
        vars(sys.modules[package]).pop(name, None)
        del sys.modules[module]

def tried(name):
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name.partition(".")[2], error)

top = types.ModuleType("knowedit_ext")
top.__path__, top.__version__ = sys.argv[1:2], "0"
sys.modules["knowedit_ext"] = top
names = [f"knowedit_ext.{name}" for name in sys.argv[2:]]
for package in sorted({name.rpartition(".")[0] for name in names}):
    forget(loaded())
    tried(package)
    kept = loaded()
    for name in (name for name in names if name.rpartition(".")[0] == package and name not in kept):
        tried(name)
        forget(loaded() - kept)
"""


def circles(folder: str, names: list[str]) -> str:
    """What cannot be the first to be imported. A module that its package imports comes, first or not, as the package
    does: only the others are imported each by itself, behind their package."""
    done = subprocess.run([sys.executable, "-c", ALONE, folder, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_no_circle_of_imports() -> None:
    """Every module can be the first that is imported; `compat` stands on the whole package and is left out."""
    modules = [module.name.partition(".")[2] for module in pkgutil.walk_packages(ke.__path__, "knowedit_ext.")]
    names = [name for name in modules if "__main__" not in name and not name.startswith(("_C", "ops", "compat"))]
    assert {"tracing.trace", "evaluation.report", "editing.methods.rome", "cli"} <= set(names)
    assert not circles(ke.__path__[0], names)


FINE = {"p/__init__": "from .a import x", "p/a": "x = 1", "p/b": "from .a import x"}
EACH = {"p/__init__": "", "p/a": "from .b import y; x = 1", "p/b": "from .a import x; y = 1"}
ONE_WAY = FINE | {"p/b": "from . import c; z = 1", "p/c": "from .b import z"}
ACROSS = {
    "p/__init__": "",
    "p/a": "from ..q.c import x",
    "q/__init__": "from .c import x",
    "q/c": "from ..p.a import x",
}


@pytest.mark.parametrize(
    "files, found",
    [(FINE, set()), (EACH, {"p.a", "p.b"}), (ONE_WAY, {"p.b"}), (ACROSS, {"p.a", "q", "q.c"})],
)
def test_a_circle_is_found(files: dict[str, str], found: set[str], tmp_path: Path) -> None:
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(code)
    names = [name.replace("/__init__", "").replace("/", ".") for name in files]
    assert {line.partition(" ")[0] for line in circles(str(tmp_path), names).splitlines()} == found
