"""A folder of cases belongs to what was asked: other settings are refused, more is added, less is served."""

from __future__ import annotations

import json
import shutil
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.datasets.records import Records
from knowedit_ext.editing.edit import LowRank
from knowedit_ext.runs.files import SEAL, load_json, write_json
from knowedit_ext.world import load_world

from ..support.processes import finish, fork, full_disk, hashes, kill_at

ASKED = dict(generation=False, group=2)
SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
import knowedit_ext as ke
from knowedit_ext.world import load_world
world = load_world()
model = ke.load_model(world.folder, dtype="float32")
print("loaded", flush=True)
ke.evaluate(model, world.records()[:COUNT], max_length=24, out=sys.argv[1], group=2)
"""


def run(out: Path, count: int = 6, **options):
    return fork(SCRIPT.replace("COUNT", str(count)), out, **options)


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return ke.load_model(load_world().folder, dtype="float32")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return load_world().records()[:5]


def rank_one(model: ke.EditableModel, seed: int) -> ke.Edit:
    draw = torch.Generator().manual_seed(seed)
    wide, out = model.modules.down_projection(2).weight.shape
    change = LowRank(torch.randn(wide, 1, generator=draw) * 0.15, torch.randn(out, 1, generator=draw) * 0.15, True)
    return ke.Edit({f"{model.modules.parameter_name(2)}.weight": change}, "random", [{}])


class Making:
    """Makes edits; counts for how many records at a time."""

    def __init__(self, model: ke.EditableModel, together: bool, name: str = "random") -> None:
        self.model, self.together, self.name, self.made = model, together, name, []

    def describe(self) -> dict:
        return {"method": self.name}

    def __call__(self, records: list[dict]) -> ke.Edit | list[ke.Edit]:
        self.made.append(len(records))
        edits = [rank_one(self.model, record["case_id"]) for record in records]
        return ke.Edit.merge(edits) if self.together else edits


EDITS = {
    "none": lambda model, count: None,
    "one": lambda model, count: rank_one(model, 9),
    "own": lambda model, count: [rank_one(model, n) for n in range(count)],
}


def changed(record: dict, key: str) -> dict:
    """The record with another value at one key."""
    record = deepcopy(record)
    if key == "target":
        record["requested_rewrite"]["target_new"]["str"] += "s"
    elif key == "subject":
        record["requested_rewrite"]["subject"] += "s"
    else:
        record[key][0] += " and"
    return record


@pytest.mark.parametrize(
    "key, message",
    [
        ("target", "requested_rewrite"),
        ("subject", "requested_rewrite"),
        ("paraphrase_prompts", "paraphrase_prompts"),
        ("neighborhood_prompts", "neighborhood_prompts"),
        ("generation_prompts", "generation_prompts"),
    ],
)
def test_whatever_a_record_holds_is_compared(model, records, tmp_path: Path, key: str, message: str) -> None:
    ke.evaluate(model, records[:3], out=tmp_path, **ASKED)
    before = hashes(tmp_path)
    other = [records[0], changed(records[1], key), records[2]]
    with pytest.raises(ValueError, match=f"made with other settings .other records case_id 1.{message}.:"):
        ke.evaluate(model, other, out=tmp_path, **ASKED)
    assert hashes(tmp_path) == before


def test_whatever_else_the_numbers_depend_on_is_compared(model, records, tmp_path: Path) -> None:
    edits = EDITS["own"](model, 3)
    ke.evaluate(model, records[:3], edits, out=tmp_path, **ASKED)
    before = hashes(tmp_path)
    swapped = [edits[0], edits[2], edits[2]]
    for arguments, message in [
        (dict(edit=swapped), "other records case_id 1.edit"),
        (dict(edit=None), "edit: .* there, None asked"),
        (dict(edit=edits[0]), "edit: "),
        (dict(edit=Making(model, False)), "edit: "),
        (dict(baseline=False), "baseline: True there, False asked"),
        (dict(attributes=True), "attributes: False there, True asked"),
        (dict(compat="reference"), "compat: None there, 'reference' asked"),
        (dict(group=3), "group: 2 there, 3 asked"),
        (dict(generation=True, max_length=9), "generation: None there"),
    ]:
        with pytest.raises(ValueError, match=f"made with other settings .*{message}"):
            ke.evaluate(model, records[:3], **dict(edit=edits, out=tmp_path) | ASKED | arguments)
    loaded = ke.load_model((model.hf, model.tokenizer), bos=False)
    with pytest.raises(ValueError, match="model.bos: None there, False asked"):
        ke.evaluate(loaded, records[:3], edits, out=tmp_path, **ASKED)
    with rank_one(model, 7).applied(model), pytest.raises(ValueError, match="other model.weights"):
        ke.evaluate(model, records[:3], edits, out=tmp_path, **ASKED)
    assert hashes(tmp_path) == before


# -- enlarged, and smaller --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EDITS)
def test_a_run_is_enlarged_to_the_bytes_of_the_large_one(model, records, tmp_path: Path, kind: str) -> None:
    make, grown, once = EDITS[kind], tmp_path / "grown", tmp_path / "once"
    for count in (1, 4, 5):
        report = ke.evaluate(model, records[:count], make(model, count), out=grown, **ASKED)
        assert [case["case_id"] for case in report.cases] == list(range(count))
    want = ke.evaluate(model, records, make(model, 5), out=once, **ASKED)
    assert hashes(grown) == hashes(once) and report.cases == want.cases


def test_only_what_is_new_is_computed(model, records, tmp_path: Path) -> None:
    making = Making(model, False)
    for count in (3, 4, 5):
        ke.evaluate(model, records[:count], making, out=tmp_path, **ASKED)
    assert making.made == [2, 1, 2, 1]  # the group of one is computed as a group of two


@pytest.mark.parametrize("kind", EDITS)
def test_a_smaller_run_is_served_and_changes_nothing(
    model, records, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = EDITS[kind]
    whole = ke.evaluate(model, records, make(model, 5), out=tmp_path, **ASKED)
    before = hashes(tmp_path)
    monkeypatch.setattr("knowedit_ext.evaluation.job.score", None)  # nothing is measured
    for count in (1, 4):
        report = ke.evaluate(model, records[:count], make(model, count), out=tmp_path, **ASKED)
        assert report.cases == whole.cases[:count]
    assert hashes(tmp_path) == before


def test_facts_edited_together_stay_together(model, records, tmp_path: Path) -> None:
    """A record whose edit has others in it is not that of a smaller run."""
    making = Making(model, True)
    ke.evaluate(model, records[:3], making, out=tmp_path / "grown", **ASKED)
    with pytest.raises(ValueError, match="case_id 0 is computed together with case_id 1 in this folder"):
        ke.evaluate(model, records[:1], making, out=tmp_path / "grown", **ASKED)
    ke.evaluate(model, records[:2], making, out=tmp_path / "grown", **ASKED)
    ke.evaluate(model, records[:4], making, out=tmp_path / "grown", **ASKED)
    assert making.made == [2, 1, 2]
    ke.evaluate(model, records[:4], making, out=tmp_path / "once", **ASKED)
    for path in (tmp_path / "once" / "cases").iterdir():  # all but how long it took
        mine, theirs = (load_json(folder / "cases" / path.name) for folder in (tmp_path / "grown", tmp_path / "once"))
        assert mine | {"time": 0} == theirs | {"time": 0}


def test_records_are_added_at_the_end(model, records, tmp_path: Path) -> None:
    ke.evaluate(model, records[:2], out=tmp_path, **ASKED)
    before = hashes(tmp_path)
    for other in (records[1::-1], records[1:3], [records[0], records[2]]):
        with pytest.raises(ValueError, match=r"records \d: case_id \d there, case_id \d asked"):
            ke.evaluate(model, other, out=tmp_path, **ASKED)
    assert hashes(tmp_path) == before


# -- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("once") / "out"
    finish(run(out))
    return out


def test_killed_while_it_is_enlarged(once: Path, tmp_path: Path) -> None:
    out = tmp_path / "grown"
    finish(run(out, 3))
    for files in (2, 4):
        kill_at(run(out), out, "cases/*.json", files)
    finish(run(out))
    assert hashes(out) == hashes(once)


def test_two_processes_on_one_folder(once: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(out)
    first.stdout.readline()
    while not list(out.glob("cases/*.json")):
        time.sleep(0.01)
    second = run(out, errors=True)
    message = second.communicate()[1].decode()
    assert second.returncode == 0 or f"another run is writing to '{out}'" in message
    finish(first)
    assert hashes(out) == hashes(once)


def test_a_full_disk_at_any_file(model, records, tmp_path: Path) -> None:
    ke.evaluate(model, records, out=tmp_path / "once", **ASKED)
    for after in (0, 1, 2, 1, 0, 1):  # each goes on where the last one met it
        with full_disk(after), pytest.raises(OSError, match=f"No space left on device.*{tmp_path}"):
            ke.evaluate(model, records, out=tmp_path / "out", **ASKED)
        assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "out" / ".lock").exists()
    ke.evaluate(model, records, out=tmp_path / "out", **ASKED)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "once")


# -- names and damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case_id", ["../../x", "/x", "a/b", "a\0b", "x" * 300])
def test_no_id_leads_out_of_the_folder(model, records, tmp_path: Path, case_id: str) -> None:
    with pytest.raises(ValueError, match="case_id"):
        ke.evaluate(model, [records[0] | {"case_id": case_id}], out=tmp_path / "out", **ASKED)
    unchecked = Records([records[0] | {"case_id": case_id}])
    with pytest.raises(ValueError, match="case_id .* cannot name a file"):
        ke.evaluate(model, unchecked, out=tmp_path / "out", **ASKED)
    assert not list(tmp_path.iterdir())


def test_two_records_of_one_id(model, records, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two records have the case_id 0"):
        ke.evaluate(model, Records([records[0], records[0]]), out=tmp_path / "out", **ASKED)


def test_an_altered_case_is_refused(model, records, tmp_path: Path) -> None:
    ke.evaluate(model, records[:2], out=tmp_path, **ASKED)
    path = tmp_path / "cases" / "0_edits-case_1.json"
    whole = path.read_text()
    without = json.loads(whole)
    del without[SEAL]
    for content in (whole.replace("true", "false", 1), json.dumps(without), whole[:-40], "", "[]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"0_edits-case_1\.json'"):
            ke.evaluate(model, records[:2], out=tmp_path, **ASKED)
    path.write_text(whole.replace("true", "false", 1))
    with pytest.raises(ValueError, match="was altered after it was written"):
        ke.Report.load(tmp_path)


def test_published_cases_have_no_seal(model, records, tmp_path: Path) -> None:
    report = ke.evaluate(model, records[:2], out=tmp_path / "out", **ASKED)
    shutil.copytree(tmp_path / "out" / "cases", tmp_path / "published")
    for path in (tmp_path / "published").iterdir():
        write_json(path, load_json(path))
    assert ke.Report.load(tmp_path / "published").cases == report.cases and SEAL not in report.cases[0]
