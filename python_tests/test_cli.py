"""The `knowedit` command, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import knowedit_ext as ke
from knowedit_ext.cli import main
from knowedit_ext.extras import EXTRAS
from knowedit_ext.world import load_world

from .support.forked import knowedit


def test_trace_one_prompt(tmp_path: Path) -> None:
    fact = load_world().facts()[0]
    prompt = fact["prompt"].replace(fact["subject"], "{}")
    arguments = ["--prompt", prompt, "--subject", fact["subject"], "--plot", "out.png", "--save", "out.npz"]
    command = [sys.executable, "-m", "knowedit_ext", "trace", "world", *arguments, "--kind", "state", "--samples", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert fact["attribute"].split()[0] in done.stdout
    assert (tmp_path / "out.png").exists() and (tmp_path / "out.npz").exists()


def test_knock_out_one_prompt(tmp_path: Path) -> None:
    fact = load_world().facts()[0]
    prompt = fact["prompt"].replace(fact["subject"], "{}")
    arguments = ["--prompt", prompt, "--subject", fact["subject"], "--kind", "knockout"]
    done = knowedit("trace", "world", *arguments, "--save", "k.json", "--plot", "k.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "without subject" in done.stdout and (tmp_path / "k.png").exists()
    assert set(ke.KnockoutTrace.load(tmp_path / "k.json").scores) >= {"subject", "last"}
    refused = knowedit("trace", "world", *arguments, "--sever", "mlp", cwd=tmp_path)
    assert refused.returncode == 2 and "--sever" in refused.stderr


def test_trace_facts(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps(load_world().facts()[:3]))
    arguments = ["--facts", "facts.json", "--out", "out", "--samples", "2", "--limit", "2", "--window", "3"]
    done = knowedit("trace", str(load_world().folder), *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Last subject token" in done.stdout
    assert len(list((tmp_path / "out" / "cases").iterdir())) == 6
    assert {"aie_lines.png", "aie_heatmap.png", "summary.json"} < {p.name for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trace", "world"], "give either --prompt"),
        (["trace", "world", "--prompt", "{} is"], "--prompt needs --subject"),
        (["trace", "world", "--prompt", "is", "--subject", "Ann"], "no '{}'"),
        (["trace", "world", "--facts", "bad.json"], "--facts needs --out"),
        (["trace", "world", "--facts", "absent.json", "--out", "out"], "absent.json"),
        (["trace", "world", "--facts", "bad.json", "--out", "out"], "'bad.json' is not JSON"),
        (["trace", "world", "--prompt", "{} is a", "--subject", "Ann", "--noise", "nan"], "noise"),
        (["trace", "world", "--prompt", "{} is a", "--subject", "Ann", "--kind", "x"], "unknown kind 'x'"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "bad.json").write_text("[")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["knowedit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    stderr = capsys.readouterr().err
    assert message in stderr and "Traceback" not in stderr
    assert {p.name for p in tmp_path.iterdir()} == {"bad.json"}


def test_doctor(tmp_path: Path) -> None:
    stdout = knowedit("doctor", cwd=tmp_path).stdout
    assert "torch" in stdout
    for name, _ in EXTRAS.values():
        try:
            assert f"{name:<13} {metadata.version(name)}" in stdout
        except metadata.PackageNotFoundError:
            assert f"{name:<13} no: " in stdout and f"-> pip install {name}" in stdout
