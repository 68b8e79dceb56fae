"""Loading of the native module: what runs, what is said when it cannot, and that the installed package is tested."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import knowedit_ext
from knowedit_ext import doctor, ops
from knowedit_ext.ops import _native


@pytest.fixture
def forgotten():
    """What was loaded and said before counts no more, nor afterwards what is within."""
    _native._load.cache_clear(), _native._warn_once.cache_clear()
    yield
    _native._load.cache_clear(), _native._warn_once.cache_clear()


@pytest.fixture
def no_native(monkeypatch, forgotten):
    """As if the module had not been built."""

    def fail(name: str):
        raise ImportError("undefined symbol: knowedit")

    monkeypatch.setattr(importlib, "import_module", fail)


def call() -> torch.Tensor:
    return ops.tree_attention(*torch.ones(3, 1, 1, 4), torch.tensor([[0, 0, 0, 1, -1]], dtype=torch.int32), 1.0)


def test_fallback_warns_once_with_the_reason(no_native, monkeypatch, caplog):
    monkeypatch.delenv("KNOWEDIT_REQUIRE_NATIVE", raising=False)
    with caplog.at_level(logging.WARNING):
        assert call().eq(1).all() and call().eq(1).all()
    (record,) = caplog.records
    assert "undefined symbol: knowedit" in record.getMessage() and "knowedit doctor" in record.getMessage()


def test_required_native_raises_the_true_reason(no_native, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_REQUIRE_NATIVE", "1")
    with pytest.raises(RuntimeError, match="undefined symbol: knowedit"):
        call()


def test_doctor_tells_why_and_the_way_out(no_native, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_REQUIRE_NATIVE", "1")
    report = doctor.report()
    assert "native cpu    no: ImportError: undefined symbol: knowedit" in report
    assert "->" in report and "KNOWEDIT_REQUIRE_NATIVE" in report


@pytest.fixture
def tree(tmp_path, monkeypatch, forgotten):
    """A package with a native source beside it, and a module that says of what it was built."""
    (tmp_path / "csrc" / "testing").mkdir(parents=True)
    (tmp_path / "csrc" / "bindings.cpp").write_text("int one;")
    monkeypatch.setattr(knowedit_ext, "__file__", str(tmp_path / "knowedit_ext" / "__init__.py"))
    built = SimpleNamespace(__file__="_C.so", version=knowedit_ext.__version__, sources="")
    built.sources = _native._sources_digest(tmp_path)
    monkeypatch.setattr(importlib, "import_module", lambda name: built)
    return tmp_path, built


def test_a_module_of_these_sources_is_used(tree):
    root, built = tree
    (root / "csrc" / "testing" / "case.cpp").write_text("is no part of the module")
    assert _native.status() == (built, "")


def test_a_module_of_other_sources_is_refused_and_said_so(tree, monkeypatch, caplog):
    root, _ = tree
    (root / "csrc" / "cuda").mkdir()
    (root / "csrc" / "cuda" / "newer.cu").write_text("int two;")
    reason = "_C.so was built from another csrc/ than lies beside the package; build it again, with `make build`"
    assert _native.status() == (None, reason)
    monkeypatch.delenv("KNOWEDIT_REQUIRE_NATIVE", raising=False)
    with caplog.at_level(logging.WARNING):
        assert call().eq(1).all()
    assert reason in caplog.records[0].getMessage()
    monkeypatch.setenv("KNOWEDIT_REQUIRE_NATIVE", "1")
    with pytest.raises(RuntimeError, match="built from another csrc/"):
        call()


@pytest.mark.parametrize("version", ["0.0.1", None])
def test_a_module_of_another_version_is_refused_where_there_are_no_sources(tree, version):
    """As installed; one from before versions were written down has none."""
    root, built = tree
    (root / "csrc" / "bindings.cpp").unlink()
    assert _native.status() == (built, "")
    del built.version
    if version:
        built.version = version
    _native._load.cache_clear()
    module, reason = _native.status()
    assert module is None and f"_C.so is of version {version or 'none'}, the package of" in reason


def test_doctor_names_versions_and_the_instruction_set():
    report = doctor.report()
    assert torch.__version__.split("+")[0] in report
    native, _ = _native.status("cpu")
    if native is not None:
        assert f"native cpu    yes: {native.cpu_isa()} in use" in report


def test_unknown_instruction_set_is_refused():
    native, reason = _native.status("cpu")
    if native is None:
        pytest.skip(reason)
    with pytest.raises(ValueError, match="instruction set 'mmx' is not usable"):
        native.use_cpu_isa("mmx")


def test_importing_the_ops_registers_them_without_loading_native_code():
    code = (
        "import sys, torch, knowedit_ext.ops;"
        "torch.ops.knowedit_ext.tree_attention, torch.ops.knowedit_ext.restore_rows;"
        "assert 'knowedit_ext._C' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(knowedit_ext.__file__).parent.parent)


def test_the_installed_package_is_the_one_tested():
    if os.environ.get("KNOWEDIT_TEST_INSTALLED") != "1":
        pytest.skip("only under `make test`")
    assert "site-packages" in knowedit_ext.__file__
