"""Tables and figures of real models, each by the commands that stand here; what was killed goes on.

    python benchmarks/real.py --work DIR [PART ...] [--records 300] [--out benchmarks/results/real]
    python benchmarks/real.py --list [PART ...]         # the commands alone

--models holds `smollm2` and `gemma3`, ordinary Hugging Face folders (SmolLM2-135M-Instruct, Gemma 3 270M); --data the
real records. Every command leaves its results in --work, where it is resumable by itself, and is run again only when it
did not end well. What is kept of a part, its commands with time and memory beside, goes to --out/PART.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

from real_parts import PARTS, Part

from knowedit_ext.runs.checksums import digest
from knowedit_ext.runs.files import atomic_write, write_json

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("KNOWEDIT_DATA") or HERE.parents[1] / "shared" / "data")
MODELS = Path.home() / ".cache" / "knowedit-models"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--work", type=Path, default=Path("out/real"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "real")
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--records", type=int, default=300, help="of the tables and of ROME's defaults")
    parser.add_argument("--generated", type=int, default=50, help="records of which texts are generated")
    parser.add_argument("--list", action="store_true", help="show the commands, run nothing")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: expected {', '.join(PARTS)}")
    for name in asked.parts or PARTS:
        run(name, PARTS[name], asked)


def run(name: str, part: Part, asked: argparse.Namespace) -> None:
    places = {"smollm2": asked.models / "smollm2", "gemma3": asked.models / "gemma3", "name": name, "here": HERE}
    places |= {"work": asked.work.resolve(), "data": asked.data.resolve()}
    places |= {"records": asked.records, "generated": asked.generated}
    if asked.list:
        print(f"# {name}: {part.about}\n{part.commands}\n")
        return
    missing = [
        str(places[key]) for key in ("smollm2", "gemma3") if f"{{{key}}}" in part.commands and not places[key].is_dir()
    ]
    if missing:
        sys.exit(f"{name} needs {' and '.join(missing)}: see docs/real-models.md")
    out, lines = asked.out / name, []
    # What is kept names no folder of this machine.
    called = {places["work"]: "WORK", places["data"]: "DATA", asked.models: "MODELS", HERE: "benchmarks"}
    for command in part.commands.splitlines():
        command, _, printed = command.format(**places).partition(" > ")
        took = once(command, asked.work / "commands", out / printed if printed else None, called)
        lines.append(f"| `{renamed(command, called)}` | {took['seconds'] / 60:.1f} | {took['megabytes']:.0f} |")
    for pattern in part.kept:
        for path in sorted(asked.work.glob(pattern)):
            target = out / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    if out.is_dir():
        text = "\n".join([f"# {name}: {part.about}", "| command | minutes | MB |", "|---|--:|--:|", *lines, ""])
        atomic_write(out / "README.md", lambda file: file.write(text.encode()))


def renamed(text: str, called: dict[Path, str]) -> str:
    for folder, name in called.items():
        text = text.replace(str(folder), name)
    return text


def once(command: str, folder: Path, printed: Path | None, called: dict[Path, str]) -> dict[str, float]:
    """Run it unless it ended well before; its seconds, those of killed runs before with them, and its peak memory.
    What it prints is kept with folders as they are `called`."""
    path = folder / f"{digest(command.encode())}.json"
    took = (
        json.loads(path.read_text())
        if path.exists()
        else {"command": command, "seconds": 0.0, "megabytes": 0.0, "ended": False}
    )
    if took["ended"] and (printed is None or printed.exists()):
        return took
    print(command, flush=True)
    words = shlex.split(command)
    words[:1] = [sys.executable, *(["-m", "knowedit_ext"] if words[0] == "knowedit" else [])]
    before, began = took["seconds"], monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / f"{path.stem}.txt"  # what stood in `printed` stays if this fails
    with open(said, "w") as file:
        process = subprocess.Popen(words, cwd=HERE.parent, stdout=None if printed is None else file)
        while process.poll() is None:
            sleep(0.5)
            took["megabytes"] = max(took["megabytes"], _peak(process.pid))
            took["seconds"] = before + monotonic() - began
            write_json(path, took)
    took["ended"] = process.returncode == 0
    if took["ended"] and printed is not None:
        text = renamed(said.read_text(), called)
        printed.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(printed, lambda file: file.write(text.encode()))
    write_json(path, took)
    if process.returncode:
        sys.exit(f"this ended with status {process.returncode}: {command}")
    return took


def _peak(process: int) -> float:
    """Megabytes that it held at most; 0 where the system does not say, or it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


if __name__ == "__main__":
    main()
