"""Every kind of mistake is one line on stderr and exit status 2; an interrupt ends with 130."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import knowedit_ext as ke
from knowedit_ext import extras
from knowedit_ext.cli import app, main
from knowedit_ext.commands.mistakes import explain
from knowedit_ext.extras import EXTRAS, MissingExtraError, require
from knowedit_ext.world import load_world

from .support.forked import knowedit

FACT = load_world().facts()[0]
PROMPT = ["--prompt", FACT["prompt"].replace(FACT["subject"], "{}"), "--subject", FACT["subject"]]
TRACE = ["trace", "world", *PROMPT]
TRAIN = ["train-editor", "world", "--data", "requests.json", "--texts", "text.txt", "--out", "o"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """(status, stderr) of a command line, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["knowedit", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, capsys.readouterr().err

    return call


def is_one_line(status: int, stderr: str, message: str) -> None:
    assert status == 2, stderr
    assert stderr.startswith("knowedit: ") and message in stderr
    assert len(stderr.splitlines()) == 1, stderr


FILES = {
    "facts.json": json.dumps([FACT]).encode(),
    "requests.json": json.dumps(load_world().records()[:2]).encode(),
    "half.json": b'[{"known_id": 1',
    "utf8.json": b'["\xff\xfe"]',
    "deep.json": b"[" * 100_000,
    "other.json": b'{"a": 1}',
    "text.txt": b"a b c\n",
    "latin.txt": b"\xe9t\xe9",
    "short.safetensors": b"half",
}
MISTAKES = [
    ([], "no command was given"),
    (["x"], "No such command 'x'"),
    (["trace"], "Missing argument"),
    (["trace", "world", "--x"], "No such option"),
    (["-q", "trace", "world"], "No such option: -q (a command's options come behind it"),
    (["study", "--json", "severed"], "No such option: --json (a command's options come behind it"),
    ([*TRACE, "--device", "gpu"], "unknown device 'gpu'"),
    ([*TRACE, "--dtype", "int4"], "unknown dtype 'int4'"),
    ([*TRACE, "--limit", "3"], "--limit cannot be given here: they go with --facts"),
    ([*TRACE, "--out", "folder"], "--out cannot be given here"),
    ([*TRACE, "--facts", "facts.json"], "give either --prompt"),
    ([*TRACE, "--noise", "nan"], "unknown noise rule 'nan'"),
    ([*TRACE, "--noise", "inf"], "unknown noise rule 'inf'"),
    ([*TRACE, "--noise=-1"], "unknown noise rule '-1'"),
    ([*TRACE, "--samples", "0"], "'--samples'"),
    ([*TRACE, "--samples", "many"], "'--samples'"),
    ([*TRACE, "--window", "0"], "'--window'"),
    ([*TRACE, "--window", "6", "--kind", "mlp"], "window is 6, the model has 6 layers"),
    ([*TRACE, "--seed=-1"], "'--seed'"),
    ([*TRACE, "--seed", str(2**32)], "'--seed'"),
    ([*TRACE, "--max-rows", "0"], "'--max-rows'"),
    ([*TRACE, "--sever", "x"], "unknown sever 'x'"),
    ([*TRACE, "--kind", "mlp", "--kind", "mlp"], "at most once"),
    ([*TRACE, "--plot", "x.bmp"], "'x.bmp': a figure is written as .png"),
    ([*TRACE, "--plot", "folder.png"], "'folder.png' is a folder, expected a file"),
    ([*TRACE, "--plot", "text.txt/x.png"], "'text.txt/x.png' cannot be made: 'text.txt' is a file"),
    ([*TRACE, "--save", "x.pt"], "a trace is saved as .npz"),
    (["trace", "absent", *PROMPT], "'absent', which is no folder here"),
    (["trace", "./absent", *PROMPT], "there is no folder './absent'"),
    (["trace", "folder", *PROMPT], "'folder' holds no model: there is no config.json"),
    (["trace", "text.txt", *PROMPT], "'text.txt' is a file: expected the folder"),
    (["trace", "damaged", *PROMPT], "cannot load the weights of the model in 'damaged'"),
    (["trace", "nan", *PROMPT], "no finite numbers"),
    (["trace", "world", "--facts", "facts.json", "--out", "text.txt"], "'text.txt' is a file, expected a folder"),
    (["trace", "world", "--facts", "facts.json", "--out", "o", "--limit=-1"], "'--limit'"),
    (["trace", "world", "--facts", "facts.json", "--out", "o", "--limit", "0"], "'--limit'"),
    (["trace", "world", "--facts", "facts.json", "--out", "o", "--plot", "x.png"], "--plot cannot be given here"),
    (["trace", "world", "--facts", "folder", "--out", "o"], "'folder'"),
    (["trace", "world", "--facts", "half.json", "--out", "o"], "'half.json' is not JSON"),
    (["trace", "world", "--facts", "utf8.json", "--out", "o"], "'utf8.json' is not JSON"),
    (["trace", "world", "--facts", "deep.json", "--out", "o"], "'deep.json'"),
    (["trace", "world", "--facts", "other.json", "--out", "o"], "'other.json' holds a dict"),
    (["edit"], "MODEL, --requests, --out, --params missing"),
    (["edit", "world", "--show", "short.safetensors"], "MODEL cannot be given here: --show FILE does nothing else"),
    (["edit", "--show", "short.safetensors"], "'short.safetensors'"),
    (["edit", "--show", "folder"], "'folder'"),
    (["edit", "world", "--requests", "requests.json", "--params", "world", "--out", "folder"], "'folder' is a folder"),
    (["edit", "world", "--requests", "requests.json", "--params", "x", "--out", "e"], "no memit preset 'x'"),
    (["edit", "world", "--requests", "utf8.json", "--params", "world", "--out", "e"], "'utf8.json' is not JSON"),
    (["moments", "world", "text.txt", "--layers", "3-1", "--out", "o"], "'3-1' is no list of layers"),
    (["moments", "world", "text.txt", "--layers", "0", "--out", "o", "--max-tokens", "0"], "'--max-tokens'"),
    (["moments", "world", "text.txt", "--layers", "0", "--out", "o", "--stop", "x"], "unknown stop 'x'"),
    (
        ["moments", "world", "text.txt", "--layers", "0", "--out", "o", "--stop", "tolerance", "--tolerance", "nan"],
        "tolerance is nan",
    ),
    (["moments", "world", "latin.txt", "--layers", "0", "--out", "o"], "'latin.txt'"),
    (["moments", "world", "folder", "--layers", "0", "--out", "o"], "folder 'folder' has no .txt"),
    ([*TRAIN, "--method", "x"], "unknown method 'x': expected 'mend' or 'efk'"),
    ([*TRAIN, "--compat", "x"], "unknown compat 'x'"),
    ([*TRAIN, "--layers", "6"], "layer 6 is out of range: the model has layers 0..5"),
    ([*TRAIN, "--params", "other.json"], "EditorTrainingParams: unknown keys a"),
    (TRAIN, "2 records with 100 of them left out"),
    (["convert-editor", "absent.pt", "e.safetensors"], "there is no file 'absent.pt'"),
    (["convert-editor", "half.json", "e.safetensors"], "'half.json' is no archive"),
    (["evaluate", "world", "--out", "o", "--compat", "x"], "unknown compat 'x'"),
    (["evaluate", "world", "--out", "o", "--num-edits", "0"], "--num-edits is 0"),
    (["evaluate", "world", "--out", "o", "--moments", "text.txt"], "'text.txt'"),
    (["evaluate", "world", "--out", "o", "--data", "other.json"], "'other.json' holds a dict"),
    (["check-edit", "world", "--edit", "short.safetensors"], "'short.safetensors'"),
    (["suggest", "world", "--out", "o", "--method", "x"], "unknown method 'x'"),
    (["ability", "world", "--edit", "short.safetensors"], "'short.safetensors'"),
    (["suggest", "world", "--out", "text.txt"], "'text.txt' is a file, expected a folder"),
    (["apply", "world", "--edit", "short.safetensors", "--out", "o"], "'short.safetensors'"),
    (["apply", "world", "--edit", "absent.safetensors", "--out", "o"], "'absent.safetensors' does not exist"),
    (["apply", "world", "--edit", "short.safetensors", "--as", "gguf", "--out", "o"], "'--as'"),
    (["generate", "world"], "give --prompt, or --edit FILE"),
    (["generate", "world", "--prompt", "a", "--html", "page.pdf"], "a page is written as .html"),
    (["explore", "world", "--method", "none"], "unknown method 'none'"),
    (["explore", "world", "--method", "pmet", "--params", "no-such"], "no-such"),
    (["explore", "gpt2-xl", "--method", "ft-l", "--port", "99999"], "--port"),
    (["generate", "world", "--prompt", ""], "has no token to go on from"),
    (["compare", "folder", "text.txt"], "are a file and a folder"),
    (["compare", "folder", "folder"], "'folder' holds no cases"),
    (["compare", "text.txt", "text.txt"], "'text.txt'"),
    (["report", "folder"], "'folder' holds no cases"),
    (["report", "absent"], "'absent' holds no cases"),
    (["download", "x"], "unknown file 'x'"),
    (["download", "counterfact", "--folder", "text.txt"], "'text.txt' is a file, expected a folder"),
    (["demo", "--edits=-1"], "'--edits'"),
    (["demo", "--out", "text.txt"], "'text.txt' is a file, expected a folder"),
    (["world", "train", "--out", "o", "--steps", "0"], "'--steps'"),
]


def fill(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    for name in ("folder", "folder.png"):
        (folder / name).mkdir()
    for name in ("damaged", "nan"):
        shutil.copytree(load_world().folder, folder / name)
    (folder / "damaged" / "model.safetensors").write_bytes(b"x" * 100)
    weights = load_file(folder / "nan" / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.bias"].fill_(torch.nan)
    save_file(weights, folder / "nan" / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_mistakes(run, tmp_path: Path, monkeypatch, arguments: list[str], message: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fill(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, stderr = run(*arguments)
    if not arguments:  # the commands there are, and then
        stderr = stderr.splitlines()[-1]
    is_one_line(status, stderr, message)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_every_command_is_among_them() -> None:
    names = {command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    assert names - {"doctor", "methods"} <= {arguments[0] for arguments, _ in MISTAKES if arguments}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_no_permission(run, tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "facts.json").chmod(0)
    is_one_line(*run("trace", "world", "--facts", "facts.json", "--out", "o"), "facts.json")
    (tmp_path / "folder").chmod(0o500)
    is_one_line(*run(*TRACE, "--plot", "folder/x.png"), "no permission in 'folder'")


# -- packages of extras ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", EXTRAS)
def test_missing_extras_name_the_line_to_type(monkeypatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    pip, _ = EXTRAS[package]
    with pytest.raises(MissingExtraError, match=f"needs {pip}, .*: pip install {pip}$"):
        require(package)
    assert issubclass(MissingExtraError, ImportError) and issubclass(MissingExtraError, ValueError)


@pytest.mark.parametrize(
    "package, arguments",
    [
        ("nltk", ["evaluate", "world", "--out", "o"]),
        ("sklearn", ["evaluate", "world", "--out", "o"]),
        ("datasets", ["moments", "world", "wikitext", "--layers", "0", "--out", "o"]),
    ],
)
def test_missing_extras_are_said_before_the_model_is_loaded(run, monkeypatch, package: str, arguments) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(ke, "load_model", lambda *args, **more: pytest.fail("the model was loaded"))
    is_one_line(*run(*arguments), f"pip install {extras.EXTRAS[package][0]}")


def test_python_callers_are_told_as_early(monkeypatch) -> None:
    model, records = ke.load_model(load_world().folder), load_world().records()[:1]
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setattr("knowedit_ext.evaluation.job.Job.run", lambda *args: pytest.fail("work was done"))
    with pytest.raises(MissingExtraError, match="pip install nltk"):
        ke.evaluate(model, records)


# -- what the machine has not got --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("arguments", [[*TRACE, "--save", "x.npz"], [*TRACE, "--plot", "x.png"]])
def test_a_full_disk(tmp_path: Path, arguments: list[str]) -> None:
    done = knowedit(*arguments, cwd=tmp_path, limits={resource.RLIMIT_FSIZE: 512})
    is_one_line(done.returncode, done.stderr, "the disk is full")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_out_of_memory(tmp_path: Path) -> None:
    arguments = [*TRACE, "--samples", "1000000", "--max-rows", "1000000000"]
    done = knowedit(*arguments, cwd=tmp_path, limits={resource.RLIMIT_AS: 8 << 30})
    is_one_line(done.returncode, done.stderr, "--max-rows")
    assert "out of memory" in done.stderr


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, message",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nOf it 1 GiB is free"), "--max-rows"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "--max-rows"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"), "--max-rows"),
        (MemoryError(), "--max-rows"),
        (caused(ValueError("cannot load"), RuntimeError("CUDA error: out of memory")), "--max-rows"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.npz"), "the disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (SafetensorError("header too large"), "header too large"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x.json"), "'x.json': Permission denied"),
        (
            FloatingPointError("the loss is nan in epoch 3:\n try a lower lr"),
            "the loss is nan in epoch 3:; try a lower",
        ),
        (RuntimeError("Expected all tensors to be on the same device"), "KNOWEDIT_DEBUG=1 shows where"),
        (ImportError("No module named 'accelerate'"), "accelerate"),
        (NotImplementedError("no such thing"), "no such thing"),
        (ke.UnsupportedModelError("a t5 is no decoder"), "a t5 is no decoder"),
        (ValueError(), "ValueError"),
    ],
)
def test_what_is_explained(error: BaseException, message: str) -> None:
    explanation = explain(error)
    assert message in explanation and len(explanation.splitlines()) == 1


def test_what_python_makes_of_a_call_is_told_from_what_is_meant_for_people() -> None:
    for call, hint in (
        (lambda: require(EXTRAS), True),
        (lambda: len(3), True),
        (lambda: ke.trace(None, "text"), False),
    ):
        with pytest.raises(Exception) as raised:  # noqa: B017
            call()
        assert ("KNOWEDIT_DEBUG" in (explain(raised.value) or "KNOWEDIT_DEBUG")) == hint


@pytest.mark.parametrize("error", [AssertionError("x"), AttributeError("x"), KeyError("x"), RecursionError("x")])
def test_faults_of_the_program_keep_their_traceback(run, monkeypatch, error: Exception) -> None:
    assert explain(error) is None

    def fail(*arguments, **more):
        raise error

    monkeypatch.setattr(ke, "load_model", fail)
    with pytest.raises(type(error)):
        run(*TRACE)


def test_the_traceback_on_request(run, monkeypatch) -> None:
    monkeypatch.setenv("KNOWEDIT_DEBUG", "1")
    status, stderr = run(*TRACE, "--device", "gpu")
    assert (
        status == 2 and "Traceback" in stderr and stderr.splitlines()[-1].startswith("knowedit: unknown device 'gpu'")
    )


def test_warnings_are_lines_too(tmp_path: Path) -> None:
    arguments = ["trace", "world", "--prompt", "{} is", "--subject", "Ann", "--noise", "0"]
    done = knowedit(*arguments, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith("knowedit: warning: corrupting 'Ann'") and len(done.stderr.splitlines()) == 1


# -- interrupts --------------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys, threading
from knowedit_ext.cli import main
threading.Timer(float(sys.argv.pop(1)), os.kill, (os.getpid(), signal.SIGINT)).start()
main()
"""
LONG = {
    "trace": [*TRACE, "--samples", "20000", "--max-rows", "2000"],
    "trace a data set": ["trace", "world", "--facts", "facts.json", "--out", "out", "--samples", "20000"],
    "moments": ["moments", "world", "long.txt", "--layers", "0-5", "--out", "out"],
    "edit": [
        "edit",
        "world",
        "--requests",
        "many.json",
        "--params",
        "world",
        "--method",
        "ft",
        "--out",
        "e.safetensors",
    ],
    "evaluate": ["evaluate", "world", "--out", "out"],
    "demo": ["demo"],
    "train": ["world", "train", "--out", "out"],
}


def as_on_a_terminal() -> None:
    """A shell that starts the tests in the background has interrupts ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("delay", ["0.5", *(pytest.param(x, marks=pytest.mark.slow) for x in ("0.01", "0.1", "1.5"))])
@pytest.mark.parametrize("name", LONG)
def test_ctrl_c(tmp_path: Path, name: str, delay: str) -> None:
    """While options are read, the model is loaded, and work is done; what is written is whole or not there."""
    fill(tmp_path)
    (tmp_path / "long.txt").write_text("\n".join(fact["prompt"] for fact in load_world().facts()) * 50)
    (tmp_path / "many.json").write_text(json.dumps(load_world().records()))
    command = [sys.executable, "-c", INTERRUPTED, delay, *LONG[name]]
    options = dict(cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=as_on_a_terminal)
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 130, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("late", ["torch", "pydantic"])
@pytest.mark.parametrize("start", ["module", "script"])
def test_ctrl_c_while_it_is_imported(tmp_path: Path, start: str, late: str) -> None:
    """As torch is imported, which takes seconds, or what typer reads options by."""
    (tmp_path / f"{late}.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    )
    script = tmp_path / "knowedit"
    script.write_text("from knowedit_ext.cli import main\nmain()\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(ke.__file__).parents[1])])}
    arguments = {"module": ["-m", "knowedit_ext"], "script": [str(script)]}[start]
    options = dict(capture_output=True, text=True, env=environment, preexec_fn=as_on_a_terminal)
    done = subprocess.run([sys.executable, *arguments, *TRACE], **options)
    assert (done.returncode, done.stderr) == (130, "")


def test_ctrl_c_while_a_program_imports_us(tmp_path: Path) -> None:
    """It ends as Python ends: nothing of the command's is done to it."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(ke.__file__).parents[1])])}
    options = dict(capture_output=True, text=True, env=environment, preexec_fn=as_on_a_terminal)
    done = subprocess.run([sys.executable, "-c", "import knowedit_ext as ke; ke.trace"], **options)
    assert done.returncode == -signal.SIGINT and "KeyboardInterrupt" in done.stderr


@pytest.mark.parametrize("chained", ["cause", "context"])
def test_an_interrupt_that_was_made_another_error_of(run, monkeypatch, chained: str) -> None:
    """As modules in C++ do where one comes while they are being imported."""

    def load(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            if chained == "context":
                raise ImportError("initialization failed")  # noqa: B904
            raise ImportError("initialization failed") from interrupt

    monkeypatch.setattr("knowedit_ext.commands.trace.load", load)
    assert run(*TRACE) == (130, "")


def test_ctrl_c_stops_a_shell(tmp_path: Path) -> None:
    """`knowedit ... && next` goes no further, whenever the key is pressed."""
    command = f"'{sys.executable}' -m knowedit_ext world train --out out && touch reached"
    options = dict(start_new_session=True, stderr=subprocess.PIPE, preexec_fn=as_on_a_terminal)
    shell = subprocess.Popen(["bash", "-c", command], cwd=tmp_path, **options)
    with pytest.raises(subprocess.TimeoutExpired):
        shell.wait(1.0)
    os.killpg(shell.pid, signal.SIGINT)
    shell.communicate()
    assert not (tmp_path / "reached").exists()
