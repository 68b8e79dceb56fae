"""The campaign: malformed inputs by the thousand, then long commands ended at every kind of moment.

python -m campaign --out out/campaign            all of it; the table, the findings
python -m campaign --target edit_files --seed 12 one input, judged here, with what it leads to
python -m campaign --command "edit, ft" --seed 3 one folder's story
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}

import argparse  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402
from random import Random  # noqa: E402
from tempfile import TemporaryDirectory, mkdtemp  # noqa: E402
from time import monotonic  # noqa: E402

from . import fuzz, kills, subjects, tables  # noqa: E402
from .targets import DOORS  # noqa: E402


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m campaign", description=__doc__)
    options.add_argument("--inputs", type=int, default=10_000)
    options.add_argument("--trials", type=int, default=256, help="folders on which commands are ended and gone on with")
    options.add_argument("--first", type=int, default=0, help="the first seed")
    options.add_argument("--target", choices=sorted(DOORS), action="append", help="only this door; may be repeated")
    options.add_argument("--command", choices=sorted(kills.COMMANDS), action="append", help="only this command")
    options.add_argument("--seed", type=int, help="only this one, of one target or one command")
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--out", type=Path, default=Path("out/campaign"))
    asked = options.parse_args()
    if asked.seed is not None:
        return _input(asked.target[0], asked.seed) if asked.target else _trial(asked.command[0], asked.seed)
    began = monotonic()
    doors = asked.target or ([] if asked.command else list(DOORS))
    commands = asked.command or ([] if asked.target else list(kills.COMMANDS))
    results = tables.Results(asked.out)
    if doors:
        inputs = fuzz.inputs_of(doors, asked.inputs, asked.first)
        for door, _, outcome in fuzz.fuzz(inputs, asked.processes):
            results.add_input(door, outcome)
    if commands:
        for told in kills.kill(fuzz.inputs_of(commands, asked.trials, asked.first), asked.processes):
            results.add_trial(told)
    results.seconds = monotonic() - began
    print(results.save())
    return 1 if results.findings else 0


def _input(door: str, seed: int) -> int:
    fuzz.quiet()
    subjects.watch()
    with TemporaryDirectory(prefix="campaign-") as folder:
        os.chdir(folder)
        found = fuzz.judge(door, seed, Path(folder))
        print(found)
        case = DOORS[door](Random(f"{door}:{seed}"), Path(folder))
        print(case.shown)
        try:
            case.check(case.call())
        except Exception:
            traceback.print_exc(file=sys.stdout)
    return 0 if isinstance(found, str) else 1


def _trial(name: str, seed: int) -> int:
    inputs = Path(mkdtemp(prefix="campaign-"))
    kills.make_inputs(inputs)
    told = kills.trial(name, seed, inputs, kills.undisturbed(name, inputs))
    print(told)
    return 1 if told.findings else 0


if __name__ == "__main__":
    sys.exit(main())
