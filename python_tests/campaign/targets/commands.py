"""`knowedit` as typed, in this process: exit status 2 and one line on stderr, or a result."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import sys
import warnings
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp

from knowedit_ext.cli import main

from .. import mutations, subjects
from ..outcome import LONGEST, Case

SEEDS: tuple[tuple[str, ...], ...] = (
    ("trace", "MODEL", "--prompt", "{} plays the", "--subject", "Miles Davis", "--samples", "1", "--save", "t.npz"),
    ("trace", "MODEL", "--facts", "facts.json", "--out", "out", "--samples", "1", "--window", "2", "--kind", "state"),
    ("edit", "MODEL", "--method", "rome", "--requests", "one.json", "--params", "rome.json", "--moments", "moments")
    + ("--out", "edit.safetensors"),
    ("edit", "MODEL", "--method", "ft", "--requests", "records.json", "--params", "ft.json", "--out", "e.safetensors"),
    ("edit", "--show", "sound.safetensors"),
    ("moments", "MODEL", "texts.txt", "--layers", "1-2", "--out", "out", "--max-texts", "5"),
    ("evaluate", "MODEL", "--data", "records.json", "--no-generation", "--out", "out"),
    ("evaluate", "MODEL", "--data", "records.json", "--no-generation", "--out", "out", "--method", "ft")
    + ("--params", "ft.json", "--limit", "1"),
    ("report", "evaluation", "--out", "table.md"),
    ("doctor",),
)
FILES = ("facts.json", "one.json", "records.json", "rome.json", "ft.json", "texts.txt", "sound.safetensors")


@cache
def _sound() -> Path:
    import knowedit_ext as ke

    folder = Path(mkdtemp(prefix="campaign-"))
    subjects.saved_model(folder)
    contents = {
        "facts.json": subjects.KNOWN,
        "one.json": [subjects.REQUEST],
        "records.json": subjects.RECORDS,
        "rome.json": subjects.params("rome"),
        "ft.json": subjects.params("ft"),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "texts.txt").write_text("\n".join(subjects.TEXTS))
    subjects.edit("rome").save(folder / "sound.safetensors")
    subjects.moments().save(folder / "moments")
    ke.evaluate(subjects.model(), subjects.RECORDS, generation=False, out=folder / "evaluation")
    return folder


def command_lines(random: Random, folder: Path) -> Case:
    """An argument changed, missing, doubled or in another place; or a damaged file behind it."""
    for path in _sound().iterdir():
        if path.name != "model":
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    arguments = [str(_sound() / "model") if word == "MODEL" else word for word in random.choice(SEEDS)]
    if random.random() < 0.3:
        path = folder / random.choice(FILES)
        path.write_bytes(mutations.octets(random, path.read_bytes()))
        arguments = [str(argument) for argument in arguments]
    else:
        for _ in range(random.choice((1, 1, 2))):
            arguments = _changed(random, arguments)
    arguments = [a.replace("\0", "").encode("utf-8", "replace").decode() for a in arguments]

    def check(result: tuple[int, str, str]) -> str | None:
        status, out, err = result
        assert "Traceback" not in err, "a traceback"
        assert status in (0, 2), f"exit status {status}"
        if status == 2:
            lines = [line for line in err.splitlines() if not line.startswith(("WARNING ", "\r"))]
            usage = lines and lines[0].startswith("Usage:")
            assert usage or len(lines) == 1, f"{len(lines)} lines on stderr: {err[:500]}"
            assert len(err) <= LONGEST, f"{len(err)} characters on stderr"
            assert usage or lines[0].startswith("knowedit: "), f"stderr: {err[:300]}"
        return "refused" if status else None

    return Case(lambda: knowedit(arguments, folder), check, shown=json.dumps(arguments)[:400])


def _changed(random: Random, arguments: list[str]) -> list[str]:
    found = list(arguments)
    at = random.randrange(len(found)) if found else 0
    change = random.random()
    if not found or change < 0.15:
        found.insert(at, random.choice(("--limit", "0", "--bogus", "--help", "-1", "--seed", "1", "--device", "tpu")))
    elif change < 0.3:
        del found[at]
    elif change < 0.4:
        other = random.randrange(len(found))
        found[at], found[other] = found[other], found[at]
    else:
        found[at] = mutations.text(random, found[at]) if random.random() < 0.5 else str(_word(random))[:20000]
    return found


def _word(random: Random) -> object:
    options = ("absent", "out", "moments", "model", "-", "--", "cuda", "cuda:7", "float8", "int8", "1-", "3-1", "0-99")
    return random.choice(options) if random.random() < 0.5 else random.choice((*mutations.NUMBERS, *mutations.TEXTS))


def knowedit(arguments: list[str], folder: Path) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command in that folder; what `main` does not handle goes through."""
    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, os.getcwd())
    sys.argv = ["knowedit", *arguments]
    os.chdir(folder)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main()
        status = 0
    except SystemExit as end:
        code = end.code
        status = 0 if code is None else code if isinstance(code, int) else 1
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
        root.handlers[:] = handlers
        root.setLevel(level)
    return status, out.getvalue(), err.getvalue()


DOORS = (command_lines,)
