"""The first second: help, versions and mistakes come before torch is imported; every name is where it should be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import knowedit_ext as ke
from knowedit_ext.commands.names import FILE_NAMES, KIND_NAMES, METHOD_NAMES, PROBLEM_NAMES, TOKEN_NAMES, may_be_preset
from knowedit_ext.datasets.download import FILES
from knowedit_ext.studies.layer_token import TOKENS
from knowedit_ext.tracing.kinds import KINDS, KNOCKOUT

FACT = ke.world_facts()[0]
TRACE = ["trace", "world", "--prompt", FACT["prompt"].replace(FACT["subject"], "{}"), "--subject", FACT["subject"]]
ONE = ["--prompt", "{} is", "--subject", "Ann", "--target", "here"]
TELL = """
import sys
from knowedit_ext.cli import main
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
LIGHT = [  # arguments, exit status, what is said
    (["--help"], 0, "Causal tracing"),
    (["-h"], 0, "Causal tracing"),
    (["--version"], 0, ke.__version__),
    (["study", "scaling", "-h"], 0, "--method"),
    (["edit", "-h"], 0, "alphaedit"),
    (["no-such-command"], 2, "No such command"),
    (["trace", "world"], 2, "give either --prompt"),
    (["trace", "world", "--nothing"], 2, "No such option"),
    (["trace", "world", "--facts", "absent.json", "--out", "o"], 2, "there is no file 'absent.json'"),
    (["edit", "world", "--method", "romee"], 2, "unknown method 'romee'"),
    (["edit", "world", "--method", "rome", "--params", "gpt9", *ONE, "--out", "e"], 2, "no rome preset 'gpt9'"),
    (["edit", "gpt9", "--method", "rome", *ONE, "--out", "e"], 2, "--params missing"),
    (["edit", "world", "--params", "absent.yaml", *ONE, "--out", "e"], 2, "there is no file 'absent.yaml'"),
    (["edit", "world", "--prompt", "Ann is"], 2, "--prompt 'Ann is' has no '{}'"),
    (["evaluate", "world", "--out", ""], 2, "--out is empty"),
    (["evaluate", "world", "--out="], 2, "--out is empty"),
    (["evaluate", "world", "--out", "o", "--problem", "x"], 2, "unknown problem 'x'"),
    (["evaluate", "world", "--out", "o", "--method", "rome", "--params", "gpt9"], 2, "no rome preset 'gpt9'"),
    (["trace", "world", "--kind", "x"], 2, "unknown kind 'x'"),
    (["trace", "world", "--sever", "x"], 2, "unknown sever 'x'"),
    (["trace", "world", "--method", "x"], 2, "unknown method 'x'"),
    (["moments", "world", "world", "--layers", "1", "--out", "m", "--stop", "x"], 2, "unknown stop 'x'"),
    (["study", "scaling", "world", "--method", "romee:mu=1", "--out", "s"], 2, "unknown method 'romee'"),
    (["edit", "world", "--prompt", "{} is"], 2, "--subject, --target, --out missing"),
    (["evaluate", "gpt2-xl", "--out", "o"], 2, "--data FILE is missing"),
    (["download", "x"], 2, "unknown file 'x'"),
    ([*TRACE, "--noise", "abc"], 2, "unknown noise rule 'abc'"),
    ([*TRACE, "--dtype", "float3"], 2, "unknown dtype 'float3'"),
    (["evaluate", "world", "--out", "o", "--noise", "s"], 2, "unknown noise rule 's'"),
    ([*TRACE, "--device", "gpu"], 2, "unknown device 'gpu'"),
    (["study", "sequential", "world", "--method", "romee+history", "--out", "s"], 2, "unknown method 'romee'"),
    (["study", "layers", "world", "--method", "romee", "--out", "s"], 2, "unknown method 'romee'"),
    (["evaluate", "world", "--out", "o", "--compat", "x"], 2, "unknown compat 'x'"),
    (["moments", "world", "world", "--layers", "3-1", "--out", "m"], 2, "'3-1' is no list of layers"),
    (["study", "severed", "world", "--noise", "s-1", "--out", "s"], 2, "unknown noise rule 's-1'"),
    (["study", "localization", "world", "--noise", "nan", "--out", "s"], 2, "unknown noise rule 'nan'"),
    (["study", "localization", "world", "--problem", "x", "--out", "s"], 2, "unknown problem 'x'"),
    (["study", "layers", "world", "--window", "x", "--out", "s"], 2, "'x' is no list of layers"),
    (["study", "layer-token", "world", "--token", "x", "--out", "s"], 2, "unknown token 'x'"),
    (["study", "localization", "world", "--method", "ft", "--out", "s"], 2, "unknown method 'ft' of the study"),
    (["evaluate", "world", "--out", "o", "--num-edits", "0"], 2, "--num-edits is 0"),
    (["suggest", "world", "--minutes", "0", "--out", "o"], 2, "--minutes is 0"),
    (["moments", "world", "world", "--layers", "1", "--out", "m", "--tolerance", "nan"], 2, "--tolerance is nan"),
    (
        ["study", "scaling", "world", "--method", "rome", "--counts", "1,x", "--out", "s"],
        2,
        "'1,x' is no list of numbers",
    ),
    (["study", "mixes", "world", "--method", "rome", "--pair", "P19", "--out", "s"], 2, "--pair 'P19'"),
]


@pytest.mark.parametrize("arguments, status, message", LIGHT, ids=[" ".join(each[0])[:40] for each in LIGHT])
def test_said_without_torch(tmp_path: Path, arguments: list[str], status: int, message: str) -> None:
    command = [sys.executable, "-c", TELL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.split()[-1]) == (status, "False"), done.stderr
    assert message in done.stdout + done.stderr


def test_the_names_that_help_tells_are_those_there_are() -> None:
    assert sorted(METHOD_NAMES) == sorted(ke.METHODS)
    assert KIND_NAMES == (*KINDS, KNOCKOUT)
    assert all(may_be_preset(name) for method in ke.METHODS.values() for name in method.presets)
    assert (PROBLEM_NAMES, TOKEN_NAMES, FILE_NAMES) == (tuple(ke.PROBLEMS), TOKENS, tuple(FILES))


def test_names() -> None:
    assert dir(ke) == sorted([*ke.__all__, "__version__"]) and {"trace", "world_facts"} <= set(ke.__all__)
    folder = Path(ke.__file__).parent
    hidden = [name for name in ke.__all__ if (folder / name).exists() or (folder / f"{name}.py").exists()]
    assert not hidden  # a module of that name would be had in place of the function
    assert ke.studies.scaling and (folder / "py.typed").exists()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ke.nothing  # noqa: B018


def test_results_for_programs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "knowedit_ext", *TRACE, "--samples", "2", "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    [found] = json.loads(done.stdout)["traces"]
    trace = ke.trace(ke.load_model("world"), ke.Fact(TRACE[3], FACT["subject"]), samples=2)
    assert found["answer"] == trace.answer and found["tokens"] == trace.tokens
    assert found["best"]["score"] == pytest.approx(float(trace.scores.max()), rel=1e-6)
    assert len(found["scores"]) == len(trace.tokens) and len(found["scores"][0]) == 6


def test_quiet_is_without_bars() -> None:
    """Of those too that are asked for by name, as the package asks for its own."""
    shown = "from tqdm import tqdm\nlist(tqdm(range(3), disable=False))"
    quiet = f"from knowedit_ext.commands.running import _set_loudness\n_set_loudness(False, True)\n{shown}"
    said = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for code in (shown, quiet)]
    assert [each.returncode for each in said] == [0, 0]
    assert "3/3" in said[0].stderr and said[1].stderr == ""
