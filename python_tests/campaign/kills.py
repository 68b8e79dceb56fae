"""Long commands, ended at every kind of moment and gone on with: the result is an undisturbed run's, byte for byte."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from tempfile import mkdtemp

from support.processes import hashes

import knowedit_ext as ke
from knowedit_ext.starting import started
from knowedit_ext.world import load_world

from .outcome import Finding
from .runs import Blow, Ending, Run, command

MOST = 3  # blows in a row, before a run is let go to its end
FULL = ("No space left on device", "File too large", "disk is full")


def make_inputs(folder: Path) -> None:
    """What the commands read."""
    world = load_world()
    (folder / "facts.json").write_text(json.dumps(world.facts()[:4]))
    (folder / "records.json").write_text(json.dumps(world.records()[:4]))
    (folder / "texts.txt").write_text("\n".join(world.statements()[:400]))
    few = dict(v_num_grad_steps=4)
    (folder / "memit.json").write_text(json.dumps(ke.MEMITParams.preset("world").to_dict() | few))
    (folder / "rome.json").write_text(json.dumps(ke.ROMEParams.preset("world").to_dict() | few))
    (folder / "ft.json").write_text(json.dumps(ke.FTParams.preset("world").to_dict() | dict(num_steps=4)))
    model = ke.load_model(world.folder, dtype="float32")
    ke.collect_moments(model, world.statements()[:2000], [1, 2, 3], progress=False).save(folder / "moments")


def _checkpointed() -> int:
    """`collect_moments` with a checkpoint as often as it may: the command's are minutes apart."""
    options = dict(out="out", batch_tokens=512, checkpoint_seconds=0.0, progress=False)
    try:
        started()
        model = ke.load_model(load_world().folder, dtype="float32")
        ke.collect_moments(model, Path("texts.txt").read_text().splitlines(), [1, 2], **options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"knowedit: {error}")
        return 2
    return 0


_EVALUATE = ("evaluate", "world", "--data", "records.json", "--no-generation", "--moments", "moments", "--out", "out")
_REQUESTS = ("--requests", "records.json", "--moments", "moments", "--out", "out/edit.safetensors")
COMMANDS: dict[str, Callable[[], int]] = {
    "trace": command("trace", "world", "--facts", "facts.json", "--out", "out", "--samples", "2", "--window", "3"),
    "moments": command("moments", "world", "texts.txt", "--layers", "1-3", "--out", "out"),
    "moments, with checkpoints": _checkpointed,
    "edit, memit": command("edit", "world", "--method", "memit", "--params", "memit.json", *_REQUESTS),
    "edit, ft": command("edit", "world", "--method", "ft", "--params", "ft.json", *_REQUESTS),
    "evaluate, memit": command(*_EVALUATE, "--method", "memit", "--params", "memit.json"),
    "evaluate, rome": command(*_EVALUATE, "--method", "rome", "--params", "rome.json"),
    "evaluate, with text": command("evaluate", "world", "--limit", "1", "--out", "out"),
}
WAYS = (
    "kill",
    "kill at a write",
    "kill in a write",
    "two",
    "kill at a write",
    "interrupt",
    "interrupt at a write",
    "full",
)


@dataclass
class Undisturbed:
    """What a command's run leaves, how long it takes, how often it changes a file, its largest file."""

    files: dict[str, str]
    seconds: float
    changes: int
    largest: int


@dataclass
class Trial:
    """One folder's story."""

    command: str
    seed: int
    kills: int = 0
    interrupts: int = 0
    full: int = 0
    together: int = 0
    resumed: int = 0
    identical: int = 0
    findings: list[Finding] = field(default_factory=list)


def undisturbed(name: str, inputs: Path) -> Undisturbed:
    with _folder(inputs) as folder:
        ending = Run(COMMANDS[name], folder).wait()
        if ending.status:
            raise RuntimeError(f"{name}: exit status {ending.status}\n{ending.said}")
        files = [path for path in (folder / "out").rglob("*") if path.is_file()]
        largest = max(path.stat().st_size for path in files)
        return Undisturbed(hashes(folder / "out"), ending.seconds, ending.changes, largest)


class _folder:  # noqa: N801
    """A new folder with the inputs in it, gone afterwards."""

    def __init__(self, inputs: Path) -> None:
        self._inputs = inputs

    def __enter__(self) -> Path:
        self._path = Path(mkdtemp(prefix="campaign-"))
        for path in self._inputs.iterdir():
            (self._path / path.name).symlink_to(path)
        (self._path / "out").mkdir()
        return self._path

    def __exit__(self, *_: object) -> None:
        if os.path.ismount(self._path / "out"):
            subprocess.run(["umount", str(self._path / "out")], check=True)
        shutil.rmtree(self._path)


def trial(name: str, seed: int, inputs: Path, sound: Undisturbed) -> Trial:
    """Blow after blow on one folder, then a run to the end."""
    told, random, job = Trial(name, seed), Random(f"{name}:{seed}"), COMMANDS[name]
    way = WAYS[seed % len(WAYS)]

    def wrong(kind: str, said: str) -> None:
        told.findings.append(Finding(name, seed, kind, said[-600:], shown=way))

    with _folder(inputs) as folder:
        if way == "two":
            _two(told, random, job, folder, sound, wrong)
        else:
            disk = way == "full" and _mount(folder / "out", random.randrange(4096, max(8192, 2 * sound.largest)))
            for _ in range(1 if disk else random.randint(1, MOST)):
                ending = Run(job, folder, None if disk else _blow(way, random, sound)).wait()
                _count(told, way, ending, wrong)
                if ending.status == 0:
                    break
            if disk:
                subprocess.run(["mount", "-o", "remount,size=256m", str(folder / "out")], check=True)
        ending = Run(job, folder).wait()
        told.resumed += 1
        if ending.status:
            wrong("does not go on", f"exit status {ending.status}: {ending.said}")
            return told
        found = hashes(folder / "out")
        differing = sorted(n for n in {**sound.files, **found} if sound.files.get(n) != found.get(n))
        if differing:
            wrong("another result", f"{', '.join(differing)}")
        else:
            told.identical += 1
    return told


def _mount(path: Path, size: int) -> bool:
    """A file system of so many bytes there; False where that is not allowed."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    return not done.returncode


def _blow(way: str, random: Random, sound: Undisturbed) -> Blow:
    number = signal.SIGINT if way.startswith("interrupt") else signal.SIGKILL
    if way.endswith("at a write"):
        return Blow(number, at=random.randrange(max(1, sound.changes)))
    if way in ("kill in a write", "full"):
        return Blow(0 if way == "full" else number, file_size=random.randrange(1, sound.largest))
    return Blow(number, after=random.uniform(0.0, sound.seconds))


def _count(told: Trial, way: str, ending: Ending, wrong: Callable[[str, str], None]) -> None:
    """What a run that was struck may end with."""
    if "Traceback" in ending.said:
        wrong("a traceback", ending.said)
    if ending.killed:
        told.kills += 1
    elif way.startswith("interrupt") and ending.status:
        told.interrupts += 1
        if ending.status != 130:
            wrong("interrupted", f"exit status {ending.status}: {ending.said}")
    elif way == "full" and ending.status:
        told.full += 1
        line = ending.said.strip().rpartition("\n")[2]
        if ending.status != 2 or "knowedit: " not in line or not any(words in line for words in FULL):
            wrong("full disk", f"exit status {ending.status}: {ending.said}")
    elif ending.status:
        wrong("ended", f"exit status {ending.status}: {ending.said}")


def _two(
    told: Trial,
    random: Random,
    job: Callable[[], int],
    folder: Path,
    sound: Undisturbed,
    wrong: Callable[[str, str], None],
) -> None:
    """Two processes on one folder, one of which may be killed: each is right or says that the other is there."""
    told.together += 1
    dies = Blow(signal.SIGKILL, after=random.uniform(0.0, 2 * sound.seconds)) if random.random() < 0.3 else None
    runs = [Run(job, folder, dies), Run(job, folder)]
    endings = [run.wait() for run in runs]
    told.kills += sum(ending.killed for ending in endings)
    for ending in endings:
        refused = ending.status == 2 and "another run is writing" in ending.said
        if not (ending.status == 0 or refused or ending.killed) or "Traceback" in ending.said:
            wrong("two at once", f"exit status {ending.status}: {ending.said}")
    if not any(ending.status == 0 for ending in endings) and dies is None:
        wrong("two at once", "neither came to an end")


def kill(trials: Sequence[tuple[str, int]], processes: int = 2) -> Iterator[Trial]:
    """The trials (command, seed), as they are done."""
    inputs = Path(mkdtemp(prefix="campaign-"))
    try:
        make_inputs(inputs)
        sound = {name: undisturbed(name, inputs) for name in dict.fromkeys(name for name, _ in trials)}
        work = partial(_trial, inputs=inputs, sound=sound)
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            yield from pool.imap_unordered(work, trials)
    finally:
        shutil.rmtree(inputs)


def _trial(which: tuple[str, int], inputs: Path, sound: dict[str, Undisturbed]) -> Trial:
    return trial(*which, inputs, sound[which[0]])
