"""Folders of results that something happened to: a damaged file is refused or computed again, never believed."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from support.processes import hashes

import knowedit_ext as ke
from knowedit_ext.runs.files import SEAL, load_json, load_npz, read_tensors

from .. import containers, mutations, subjects
from ..outcome import Case


@cache
def _made(kind: str) -> Path:
    """A sound folder of each kind, made once a process."""
    folder = Path(mkdtemp(prefix="campaign-")) / kind
    RUNS[kind](folder)
    return folder


def _trace(out: Path) -> ke.Effects:
    facts = [{key: value for key, value in known.items()} for known in subjects.KNOWN]
    return ke.trace_dataset(subjects.model(), facts, out, kinds=("state",), samples=1, window=2, progress=False)


def _moments(out: Path) -> ke.Moments:
    return ke.collect_moments(subjects.model(), subjects.TEXTS, subjects.LAYERS, out=out, progress=False)


def _evaluate(out: Path) -> ke.Report:
    return ke.evaluate(subjects.model(), subjects.RECORDS, subjects.edit("memit"), generation=False, out=out)


RUNS = {"trace": _trace, "moments": _moments, "evaluate": _evaluate}


def _damage(random: Random, path: Path) -> str:
    """Damage a file of a folder; says how."""
    data = path.read_bytes()
    if random.random() < 0.15:
        path.unlink()
        return "gone"
    if random.random() < 0.4:
        if path.suffix == ".json":
            given = mutations.json_value(random, json.loads(data))
            path.write_text(json.dumps(given))
            sealed = isinstance(given, dict) and SEAL in given
            return "another JSON" if sealed else "another JSON, without a seal"
        if path.suffix == ".safetensors":
            path.write_bytes(containers.safetensors(random, data))
            return "another header"
    path.write_bytes(mutations.octets(random, data))
    return "damaged"


def _same(one: Path, other: Path) -> bool:
    """Equal bytes; or content, where the damage was to how it is written."""
    if not (one.exists() and other.exists()):
        return False
    if one.read_bytes() == other.read_bytes():
        return True
    if one.suffix == ".json":
        return load_json(one) == load_json(other)
    if one.suffix == ".safetensors":
        (here, told), (there, tells) = read_tensors(one), read_tensors(other)
        return told == tells and here.keys() == there.keys() and all(torch.equal(here[k], there[k]) for k in here)
    if one.suffix == ".npz":
        here, there = load_npz(one), load_npz(other)
        return here.keys() == there.keys() and all(np.array_equal(here[k], there[k]) for k in here)
    return False


def resumed(random: Random, folder: Path) -> Case:
    """A run that goes on in a folder where one file was damaged ends with what an undisturbed one has, or refuses."""
    kind = random.choice(sorted(RUNS))
    sound, out = _made(kind), folder / kind
    shutil.copytree(sound, out)
    path = random.choice(sorted(path for path in out.rglob("*") if path.is_file()))
    how = _damage(random, path)

    def check(_: Any) -> None:
        expected, found = hashes(sound), hashes(out)
        differing = [name for name in {**expected, **found} if not _same(sound / name, out / name)]
        assert not differing, f"{path.name} {how}: {', '.join(differing)} differ from an undisturbed run's"

    return Case(lambda: RUNS[kind](out), check, (path.name, kind), f"{kind}: {path.relative_to(out)} {how}")


def stored_moments(random: Random, folder: Path) -> Case:
    """`Moments.load` of a damaged folder."""
    sound, out = _made("moments"), folder / "moments"
    shutil.copytree(sound, out)
    path = random.choice(sorted(out.iterdir()))
    how = _damage(random, path)

    def check(found: ke.Moments) -> None:
        for layer in found:
            expected = ke.Moments.load(sound)[layer]
            assert torch.equal(found[layer].mean, expected.mean), f"{path.name} {how}: read as other moments"
            assert found[layer].count == expected.count

    return Case(lambda: ke.Moments.load(out), check, (path.name, path.stem), f"{path.name} {how}")


def reports(random: Random, folder: Path) -> Case:
    """`Report.load` of damaged or foreign cases, and its table."""
    sound, out = _made("evaluate"), folder / "evaluate"
    shutil.copytree(sound, out)
    path = random.choice(sorted(path for path in out.rglob("*.json") if path.is_file()))
    if foreign := random.random() < 0.4:  # a case that others wrote, in the published layout
        case = json.loads(random.choice(sorted(out.glob("cases/*.json"))).read_text())
        path = out / "1_edits-case_9.json"
        kept = {k: v for k, v in case.items() if k in ("requested_rewrite", "pre", "post", "time", "num_edits")}
        path.write_text(json.dumps(mutations.json_value(random, kept | {"case_id": 9, "grouped_case_ids": [9]})))
        how = "foreign"
    else:
        how = _damage(random, path)

    def call() -> ke.Report:
        found = ke.Report.load(out)
        found.markdown()
        return found

    def check(found: ke.Report) -> None:
        json.dumps(found.to_dict(), allow_nan=False)
        if not foreign and path.parent.name == "cases" and how in ("damaged", "another JSON"):
            assert found.cases == ke.Report.load(sound).cases, f"{path.name} {how}: read as another case"

    return Case(call, check, (path.name,), f"{path.relative_to(out)} {how}")


DOORS = (resumed, stored_moments, reports)
