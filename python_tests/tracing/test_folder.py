"""A folder of traces belongs to what was asked: other settings are refused, more is added, less is served."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import knowedit_ext as ke
from knowedit_ext.datasets import KnownFact
from knowedit_ext.editing.edit import LowRank
from knowedit_ext.runs.files import SEAL
from knowedit_ext.tracing import dataset

from ..support.families import tiny_hf
from ..support.processes import finish, fork, full_disk, hashes, kill_at
from ..support.tokenizers import word_level

ASKED = dict(kinds=("state",), samples=2, noise=0.2, group=2, progress=False)
TINY = ke.Fact("w5 w6 {} w9 w7", "w7", target=" w20", occurrence=0, prefix="w4 ")
FACTS = [ke.Fact("w5 w6 {} w9", f"w{n}", target=" w20") for n in (3, 7, 11, 12, 30)]
SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
import knowedit_ext as ke
from knowedit_ext.world import load_world
world = load_world()
model = ke.load_model(world.folder, dtype="float32")
print("loaded", flush=True)
facts = [f for f in world.facts()[:20] if len(model.tokenizer.encode(" " + f["attribute"])) == 1][:COUNT]
ke.trace_dataset(model, facts, sys.argv[1], window=3, samples=2, noise=0.2, group=2, max_rows=300, progress=False)
"""


def run(out: Path, count: int = 6, **options):
    return fork(SCRIPT.replace("COUNT", str(count)), out, **options)


def tiny(seed: int = 0, tokenizer=None, **options) -> ke.EditableModel:
    return ke.load_model((tiny_hf("gpt2", seed), tokenizer or word_level()), **options)


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return tiny()


def sampler(normal: torch.Tensor) -> torch.Tensor:
    return 0.3 * normal


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model=lambda: tiny(1)), "other model.weights"),
        (dict(model=lambda: tiny(dtype="bfloat16")), "model.dtype: 'float32' there, 'bfloat16' asked"),
        (dict(model=lambda: tiny(tokenizer=word_level(58))), "other model.tokenizer"),
        (dict(model=lambda: tiny(bos=False)), "model.bos: None there, False asked"),
        (dict(fact=replace(TINY, target=" w22")), "known_id 0.target: ' w20' there, ' w22' asked"),
        (dict(fact=replace(TINY, attribute="w22")), "known_id 0.attribute: None there, 'w22' asked"),
        (dict(fact=replace(TINY, occurrence=1)), "known_id 0.occurrence: 0 there, 1 asked"),
        (dict(fact=replace(TINY, prefix="w3 ")), "known_id 0.prefix: 'w4 ' there, 'w3 ' asked"),
        (dict(fact=replace(TINY, subject="w8", occurrence=None)), "known_id 0.subject: 'w7' there, 'w8' asked"),
        (dict(fact=replace(TINY, prompt="w5 w6 {} w8 w7")), "known_id 0.prompt"),
        (dict(fact=KnownFact(3, TINY)), "facts 0: known_id 0 there, known_id 3 asked"),
        (dict(noise=0.3), "noise.level: 0.2 there, 0.3 asked.*noise=0.2 keeps it"),
        (dict(noise="u0.2"), "noise.uniform: False there, True asked"),
        (dict(noise="m", texts=["w1 w2 w3", "w4 w5"]), "noise.rule: nothing there, 'm' asked"),
        (dict(noise=sampler), "noise.sampler: nothing there"),
        (dict(replace=True), "replace: False there, True asked"),
        (dict(seed=2), "seed: 1 there, 2 asked"),
        (dict(samples=3), "samples: 2 there, 3 asked"),
        (dict(window=3), "window: 2 there, 3 asked"),
        (dict(sever="mlp"), "sever: None there, 'mlp' asked"),
        (dict(compat="reference"), "compat: None there, 'reference' asked"),
        (dict(score="logprob"), "score: 'probability' there, 'logprob' asked"),
        (dict(answer_tokens=2), "answer_tokens: 1 there, 2 asked"),
        (dict(group=3), "group: 2 there, 3 asked"),
    ],
)
def test_whatever_the_numbers_depend_on_is_compared(model, tmp_path: Path, change: dict, message: str) -> None:
    ke.trace_dataset(model, [TINY], tmp_path, **ASKED)
    before = hashes(tmp_path)
    other = change["model"]() if "model" in change else model
    options = {name: value for name, value in change.items() if name not in ("model", "fact")}
    with pytest.raises(ValueError, match=f"made with other settings .*{message}"):
        ke.trace_dataset(other, [change.get("fact", TINY)], tmp_path, **ASKED | options)
    assert hashes(tmp_path) == before


def test_edits_in_force_are_compared(model, tmp_path: Path) -> None:
    change = LowRank(torch.ones(4 * model.hidden_size, 1), torch.ones(model.hidden_size, 1), True)
    edit = ke.Edit({f"{model.modules.parameter_name(1)}.weight": change}, "test")
    ke.trace_dataset(model, [TINY], tmp_path / "plain", **ASKED)
    with edit.applied(model):
        with pytest.raises(ValueError, match=r"other model\.weights"):
            ke.trace_dataset(model, [TINY], tmp_path / "plain", **ASKED)
        ke.trace_dataset(model, [TINY], tmp_path / "edited", **ASKED)
    with pytest.raises(ValueError, match=r"other model\.weights"):
        ke.trace_dataset(model, [TINY], tmp_path / "edited", **ASKED)
    ke.trace_dataset(model, [TINY], tmp_path / "plain", **ASKED)


def test_a_models_name_is_not_what_it_is(tmp_path: Path) -> None:
    ke.trace_dataset(ke.EditableModel(tiny_hf("gpt2"), word_level(), name="here"), [TINY], tmp_path, **ASKED)
    ke.trace_dataset(ke.EditableModel(tiny_hf("gpt2"), word_level(), name="there"), [TINY], tmp_path, **ASKED)


def test_the_texts_and_the_draws_of_noise_are_compared(model, tmp_path: Path) -> None:
    texts, asked = ["w1 w2 w3", "w4 w5 w9"], {**ASKED, "noise": "m"}
    ke.trace_dataset(model, [TINY], tmp_path / "m", texts=texts, **asked)
    with pytest.raises(ValueError, match=r"other noise\.texts"):
        ke.trace_dataset(model, [TINY], tmp_path / "m", texts=texts[::-1], **asked)
    asked = {**ASKED, "noise": sampler}
    ke.trace_dataset(model, [TINY], tmp_path / "s", **asked)
    ke.trace_dataset(model, [TINY], tmp_path / "s", **asked | {"noise": lambda normal: 0.3 * normal})  # the same draws
    with pytest.raises(ValueError, match=r"other noise\.sampler"):
        ke.trace_dataset(model, [TINY], tmp_path / "s", **asked | {"noise": lambda normal: 0.31 * normal})
    with pytest.raises(ValueError, match="the sampler gives other noise for the same draws"):
        ke.trace_dataset(model, [TINY], tmp_path / "r", **asked | {"noise": torch.randn_like})
    assert not (tmp_path / "r").exists()


def test_a_rule_that_comes_to_a_number_is_that_number(model, tmp_path: Path) -> None:
    asked = {**ASKED, "noise": "s3"}
    ke.trace_dataset(model, FACTS[:2], tmp_path / "grown", **asked)
    with pytest.raises(ValueError, match=r"noise\.level: .*over the subjects of all known_ids") as error:
        ke.trace_dataset(model, FACTS, tmp_path / "grown", **asked)
    asked["noise"] = float(re.search(r"noise=([\d.e-]+) keeps it", str(error.value))[1])
    ke.trace_dataset(model, FACTS, tmp_path / "grown", **asked)
    ke.trace_dataset(model, FACTS, tmp_path / "once", **asked)
    assert hashes(tmp_path / "grown") == hashes(tmp_path / "once")


def test_cases_without_settings_are_not_taken_for_ones_own(model, tmp_path: Path) -> None:
    ke.trace_dataset(model, [TINY], tmp_path, **ASKED)
    settings = tmp_path / "settings.json"
    for content in ("{", "[]", '{"samples": 2}', "\udc80"):
        settings.write_text(content, errors="surrogateescape")
        with pytest.raises(ValueError, match="choose another folder"):
            ke.trace_dataset(model, [TINY], tmp_path, **ASKED)
    settings.unlink()
    with pytest.raises(ValueError, match=r"has cases, but no settings\.json"):
        ke.trace_dataset(model, [TINY], tmp_path, **ASKED)


# -- enlarged, and smaller --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def five(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five facts and two kinds at once."""
    out = tmp_path_factory.mktemp("five") / "out"
    ke.trace_dataset(model, FACTS, out, **ASKED | {"kinds": ("state", "mlp")})
    return out


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Facts and kinds of every sweep from here on."""
    calls, real = [], dataset.trace_plans

    def count(model, plans, kinds):
        calls.append((len(plans), *kinds))
        return real(model, plans, kinds)

    monkeypatch.setattr(dataset, "trace_plans", count)
    return calls


def test_a_run_is_enlarged_to_the_bytes_of_the_large_one(model, five: Path, tmp_path: Path, swept: list) -> None:
    ke.trace_dataset(model, FACTS[:3], tmp_path, **ASKED)
    assert swept == [(2, "state"), (1, "state")]
    ke.trace_dataset(model, FACTS[:4], tmp_path, **ASKED)  # the group that was not full is computed as a whole
    assert swept[2:] == [(2, "state")]
    effects = ke.trace_dataset(model, FACTS[:4], tmp_path, **ASKED | {"kinds": ("mlp",)})
    assert swept[3:] == [(2, "mlp"), (2, "mlp")] and list(effects.kinds) == ["mlp"]
    ke.trace_dataset(model, FACTS, tmp_path, **ASKED | {"kinds": ("mlp", "state")})
    assert sorted(swept[5:]) == [(1, "mlp"), (1, "state")]
    ke.trace_dataset(model, FACTS, tmp_path, **ASKED | {"kinds": ("state", "mlp")})
    assert len(swept) == 7 and hashes(tmp_path) == hashes(five)


@pytest.mark.parametrize("count, kinds", [(4, ("state",)), (2, ("state", "mlp")), (3, ("mlp",))])
def test_a_smaller_run_is_served_and_changes_nothing(model, five: Path, swept: list, count: int, kinds: tuple) -> None:
    before = hashes(five)
    effects = ke.trace_dataset(model, FACTS[:count], five, **ASKED | {"kinds": kinds})
    assert set(effects.kinds) == set(kinds) and effects.kinds[kinds[0]].cases == count
    assert not swept and hashes(five) == before


def test_a_smaller_run_does_not_compute_half_a_group(model, five: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(five, out)
    (out / "cases" / "knowledge_2.npz").unlink()
    with pytest.raises(ValueError, match="known_id 2 is computed together with known_id 3 in this folder"):
        ke.trace_dataset(model, FACTS[:3], out, **ASKED)
    ke.trace_dataset(model, FACTS[:4], out, **ASKED)
    assert hashes(out) == hashes(five)


def test_facts_are_added_at_the_end(model, tmp_path: Path) -> None:
    known = [KnownFact(n, fact) for n, fact in enumerate(FACTS)]
    ke.trace_dataset(model, known[:2], tmp_path, **ASKED)
    before = hashes(tmp_path)
    for others in (known[::-1], [known[2]], [known[0], known[2]], known[1:]):
        with pytest.raises(ValueError, match=r"facts \d: known_id \d+ there, known_id \d+ asked"):
            ke.trace_dataset(model, others, tmp_path, **ASKED)
    assert hashes(tmp_path) == before


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six facts, in one process that nothing disturbed."""
    out = tmp_path_factory.mktemp("once") / "out"
    finish(run(out))
    return out


def test_killed_while_it_is_enlarged(once: Path, tmp_path: Path) -> None:
    out = tmp_path / "grown"
    kill_at(run(out, 3), out, "cases/knowledge_*.npz", 4)
    finish(run(out, 3))
    for files in (6, 12):
        kill_at(run(out), out, "cases/knowledge_*.npz", files)
    finish(run(out))
    assert hashes(out) == hashes(once)


# -- two processes ----------------------------------------------------------------------------------------------------


def test_two_processes_on_one_folder(once: Path, tmp_path: Path) -> None:
    """While one writes the other says so; afterwards it is served. The lock of one that was killed holds nobody up."""
    out = tmp_path / "traces"
    first = run(out)
    first.stdout.readline()
    while not list(out.glob("cases/*.npz")):
        time.sleep(0.01)
    second = run(out, errors=True)
    message = second.communicate()[1].decode()
    early = first.poll() is None  # the other one was there in time
    assert second.returncode == (1 if early else 0)
    assert not early or f"another run is writing to '{out}'" in message
    first.kill()
    first.communicate()
    finish(run(out))
    finish(run(out))
    assert hashes(out) == hashes(once)


def test_begun_together(once: Path, tmp_path: Path) -> None:
    out = tmp_path / "traces"
    runs = [run(out, errors=True) for _ in range(3)]
    messages = [each.communicate()[1].decode() for each in runs]
    assert 0 in [each.returncode for each in runs]
    assert all(
        each.returncode == 0 or "another run is writing" in text for each, text in zip(runs, messages, strict=True)
    )
    assert hashes(out) == hashes(once)


def test_a_full_disk_at_any_file(model, five: Path, tmp_path: Path) -> None:
    asked = ASKED | {"kinds": ("state", "mlp")}
    for after in range(0, 12, 2):  # each goes on where the last one met it
        with full_disk(after % 5), pytest.raises(OSError, match=f"No space left on device.*{tmp_path}"):
            ke.trace_dataset(model, FACTS, tmp_path / "out", **asked)
        assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "out" / ".lock").exists()
    ke.trace_dataset(model, FACTS, tmp_path / "out", **asked)
    assert hashes(tmp_path / "out") == hashes(five)


# -- names and damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known_id", ["../../x", "/x", "a/b", "a\0b", "x" * 300])
def test_no_id_leads_out_of_the_folder(model, tmp_path: Path, known_id: str) -> None:
    with pytest.raises(ValueError, match="known_id .* cannot name a file"):
        ke.trace_dataset(model, [KnownFact(known_id, TINY)], tmp_path / "out", **ASKED)
    assert not list(tmp_path.iterdir())


def test_an_altered_case_is_refused(model, tmp_path: Path) -> None:
    ke.trace_dataset(model, [TINY], tmp_path, **ASKED)
    path = tmp_path / "cases" / "knowledge_0.npz"
    with np.load(path) as file:
        held = dict(file)
    for arrays in (held | {"scores": held["scores"] + 1}, {k: v for k, v in held.items() if k != SEAL}):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=r"knowledge_0\.npz' was altered after it was written: delete it"):
            ke.trace_dataset(model, [TINY], tmp_path, **ASKED)
