"""What is handed out: a source archive has all that building takes, and all that the installed package reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
PARTS = ("knowedit_ext", "csrc", "docs", "setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md")
PARTS += ("LICENSE", "CHANGELOG.md", "CITATION.cff", "constraints.txt")


def members(folder: Path) -> set[str]:
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(folder / "dist" / done.stdout.split()[-1]) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    pytest.importorskip("setuptools", "77", reason="no setuptools to build by")
    pytest.importorskip("pybind11", reason="no pybind11 to build by")
    left_out = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "build")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tmp_path / part, ignore=left_out)
        else:
            shutil.copy(ROOT / part, tmp_path / part)
    return tmp_path


def test_the_source_archive_is_whole(tree: Path) -> None:
    wanted = {
        str(path.relative_to(tree))
        for part in ("knowedit_ext", "csrc")
        for path in (tree / part).rglob("*")
        if path.is_file()
    }
    wanted |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"}
    assert {"knowedit_ext/py.typed", "knowedit_ext/__init__.pyi", "knowedit_ext/pages/page.html.j2"} <= wanted
    assert not wanted - members(tree)


def test_a_folder_that_is_left_out_is_found(tree: Path) -> None:
    (tree / "MANIFEST.in").unlink()
    assert "CMakeLists.txt" not in members(tree)
