"""`knowedit moments`, as a user types it."""

from __future__ import annotations

import sys

import pytest

import knowedit_ext as ke
from knowedit_ext.cli import main
from knowedit_ext.world import load_world


def knowedit(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["knowedit", *arguments])
    try:
        main()
    except SystemExit as stopped:
        return stopped.code or 0
    return 0


def test_moments(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("\n".join(fact["prompt"] for fact in load_world().facts()[:40]))
    monkeypatch.chdir(tmp_path)
    arguments = ["--layers", "0-1,2", "--out", "out", "--npz", "stats", "--max-tokens", "100"]
    assert knowedit(monkeypatch, "moments", "world", "text.txt", *arguments) == 0
    output = capsys.readouterr().out
    assert "layer 2:" in output and "over 100 keys" in output and "text_stats" in output
    assert ke.Moments.load("out").layers == [0, 1, 2]
    assert len(list(tmp_path.glob("stats/*/text_stats/*.npz"))) == 3


@pytest.mark.parametrize(
    "layers, message", [("x", "'x' is no list of layers"), ("3-1", "'3-1'"), ("99", "layer 99 is")]
)
def test_mistakes(tmp_path, monkeypatch, capsys, layers, message):
    (tmp_path / "text.txt").write_text("a b")
    monkeypatch.chdir(tmp_path)
    assert knowedit(monkeypatch, "moments", "world", "text.txt", "--layers", layers, "--out", "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
