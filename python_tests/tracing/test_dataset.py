"""`trace_dataset`: published files, resumption after a kill, shards, settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import knowedit_ext as ke
from knowedit_ext.datasets import load_known
from knowedit_ext.world import load_world

from ..support.processes import finish, fork, hashes, kill_at

PUBLISHED = {
    "scores",
    "low_score",
    "high_score",
    "input_ids",
    "input_tokens",
    "subject_range",
    "answer",
    "window",
    "correct_prediction",
    "kind",
}
SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
import knowedit_ext as ke
from knowedit_ext.world import load_world
world = load_world()
model = ke.load_model(world.folder, dtype="float32")
print("loaded", flush=True)
facts = [f for f in world.facts()[:20] if len(model.tokenizer.encode(" " + f["attribute"])) == 1]
ke.trace_dataset(model, facts[:6], sys.argv[1], window=3, samples=2, group=2, max_rows=300, progress=False)
"""


@pytest.fixture(scope="module")
def model() -> ke.EditableModel:
    return ke.load_model(load_world().folder, dtype="float32")


def world_facts(tokens: int) -> list[dict]:
    """The world's facts whose attribute has so many tokens."""
    tokenizer = AutoTokenizer.from_pretrained(load_world().folder)
    return [dict(f) for f in load_world().facts()[:60] if len(tokenizer.encode(" " + f["attribute"])) == tokens]


def known_facts() -> list[dict]:
    """As the published check of the prediction wants them."""
    return world_facts(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "traces"
    finish(fork(SCRIPT, out))
    return out


def test_killed_and_resumed_is_byte_identical(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "traces"
    for files in (0, 1, 4, 9, 13):  # kill -9 when so many cases are there, at any point of writing the next
        kill_at(fork(SCRIPT, out), out, "cases/knowledge_*.npz", files)
        for path in out.glob("cases/knowledge_*.npz"):
            ke.Trace.load(path)  # whatever is there is whole
    finish(fork(SCRIPT, out))
    assert hashes(out) == hashes(whole)
    assert len(hashes(out)) == 6 * 3 + 2


def test_a_case_that_was_lost_comes_back_as_it_was(model: ke.EditableModel, tmp_path: Path) -> None:
    arguments = dict(window=3, samples=2, group=3, progress=False)
    facts = known_facts()[:4]
    ke.trace_dataset(model, facts, tmp_path, **arguments)
    before = hashes(tmp_path)
    (tmp_path / "cases" / f"knowledge_{facts[1]['known_id']}_mlp.npz").unlink()
    (tmp_path / "cases" / ".knowledge_1_mlp.npz.abc.tmp").write_bytes(b"half of a file")
    ke.trace_dataset(model, facts, tmp_path, **arguments)
    assert hashes(tmp_path) == before


def test_two_ranks_write_the_same(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "traces"
    finish(fork(SCRIPT, out, ranks=2))
    assert hashes(out) == hashes(whole)


def test_cases_are_published_files_and_equal_single_traces(model: ke.EditableModel, tmp_path: Path) -> None:
    facts = known_facts()[:3]
    ke.trace_dataset(model, facts, tmp_path, kinds=("state", "attn"), window=3, samples=3, noise=0.2, progress=False)
    for record in facts:
        for kind, suffix in (("state", ""), ("attn", "_attn")):
            path = tmp_path / "cases" / f"knowledge_{record['known_id']}{suffix}.npz"
            with np.load(path, allow_pickle=False) as file:
                assert set(file.files) >= PUBLISHED
                assert str(file["kind"]) == ("" if kind == "state" else kind)
            alone = ke.trace(model, load_known([record])[0].fact, kind=kind, window=3, samples=3, noise=0.2)
            case = ke.Trace.load(path)
            np.testing.assert_allclose(case.scores, alone.scores, atol=1e-5)
            assert case.answer.strip() == record["attribute"].split()[0]


def test_answers_of_several_tokens(model: ke.EditableModel, tmp_path: Path) -> None:
    """The length of the answer and the score are those of single traces; a target is taken whole."""
    say = lambda fact, n: ke.trace(model, fact, samples=1, answer_tokens=n).answer  # noqa: E731
    record = next(f for f in world_facts(2) if say(ke.Fact(f["template"], f["subject"]), 2) == " " + f["attribute"])
    target = ke.Fact(record["template"], record["subject"], target=" " + record["attribute"])
    asked = dict(window=2, samples=2, noise=0.1, seed=1, score="logprob")
    for name, fact, tokens in (("own", record, 2), ("target", target, 1)):
        ke.trace_dataset(model, [fact], tmp_path / name, ("mlp",), answer_tokens=tokens, **asked, progress=False)
        [path] = (tmp_path / name / "cases").glob("knowledge_*_mlp.npz")
        with np.load(path) as case:
            want = ke.trace(model, ke.Fact(record["template"], record["subject"]), "mlp", answer_tokens=2, **asked)
            assert case["correct_prediction"] and case["answer"] == " " + record["attribute"] == want.answer
            np.testing.assert_allclose(case["scores"], want.scores, rtol=1e-4, atol=1e-5)
            assert abs(case["high_score"] - want.high_score) < 1e-5 and want.high_score < 0
    with pytest.raises(ValueError, match="score='logit_difference' and against="):
        ke.trace_dataset(model, [record], tmp_path / "refused", score="logit_difference")


def test_a_target_and_an_attribute_of_several_tokens(model: ke.EditableModel, tmp_path: Path) -> None:
    """Known is what the model goes on to say, however many tokens it takes, and whatever target is traced."""
    record = next(
        f
        for f in world_facts(2)
        if ke.trace(model, ke.Fact(f["template"], f["subject"]), samples=1, answer_tokens=2).answer.strip()
        == f["attribute"]
    )
    attribute = record["attribute"]
    wanted = {
        (" nobody", attribute): True,
        (" " + attribute, attribute): True,
        (" " + attribute, attribute + "s"): False,
    }
    wanted |= {(" " + attribute, "x"): False, (" " + attribute, attribute[:-1]): False, (" nobody", None): True}
    facts = [ke.Fact(record["template"], record["subject"], *pair) for pair in wanted]
    for tokens in (1, 2):
        out = tmp_path / str(tokens)
        effects = ke.trace_dataset(
            model, facts, out, ("state",), samples=1, noise=0.1, answer_tokens=tokens, progress=False
        )
        for number, ((target, _), known) in enumerate(wanted.items()):
            with np.load(out / "cases" / f"knowledge_{number}.npz") as case:
                assert bool(case["correct_prediction"]) is known
                assert not known or str(case["answer"]) == target
        assert (effects.kinds["state"].cases, effects.kinds["state"].skipped) == (3, 3)
    for fact, known in zip(facts, wanted.values(), strict=True):
        assert ke.trace(model, fact, samples=1, noise=0.1).correct_prediction is known


def test_facts_the_model_does_not_know_are_skipped(model: ke.EditableModel, tmp_path: Path) -> None:
    facts = known_facts()[:3]
    facts[1]["attribute"] = "nothing"
    effects = ke.trace_dataset(model, facts, tmp_path, kinds=("state",), samples=2, progress=False)
    assert (effects.kinds["state"].cases, effects.kinds["state"].skipped) == (2, 1)
    path = tmp_path / "cases" / f"knowledge_{facts[1]['known_id']}.npz"
    with np.load(path, allow_pickle=False) as file:
        assert not file["correct_prediction"]
    with pytest.raises(ValueError, match="did not predict"):
        ke.Trace.load(path)


def test_nothing_known_is_no_error(model: ke.EditableModel, tmp_path: Path) -> None:
    fact = {**known_facts()[0], "attribute": "nothing"}
    assert ke.trace_dataset(model, [fact], tmp_path, samples=2, progress=False).kinds == {}


def test_other_settings_are_refused(model: ke.EditableModel, tmp_path: Path) -> None:
    facts = known_facts()[:1]
    ke.trace_dataset(model, facts, tmp_path, kinds=("state",), samples=2, progress=False)
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match="samples: 2 there, 3 asked"):
        ke.trace_dataset(model, facts, tmp_path, kinds=("state",), samples=3, progress=False)
    assert hashes(tmp_path) == before


def test_a_damaged_case_is_named(model: ke.EditableModel, tmp_path: Path) -> None:
    facts = known_facts()[:1]
    ke.trace_dataset(model, facts, tmp_path, kinds=("state",), samples=2, progress=False)
    path = tmp_path / "cases" / f"knowledge_{facts[0]['known_id']}.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=path.name):
        ke.trace_dataset(model, facts, tmp_path, kinds=("state",), samples=2, progress=False)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("{}", "expected a list"),
        ("[]", "no facts"),
        ("[3]", "record 0 .* is a int"),
        ('[{"known_id": 0, "subject": "a", "attribute": "b"}]', "record 0 .* lacks 'prompt': a fact is {"),
        (
            '[{"known_id": 7, "prompt": "a is", "subject": "a", "attribute": "b"},'
            ' {"prompt": "a is", "subject": "a", "attribute": "b"}]',
            "record 1 .* lacks 'known_id': which others have",
        ),
        ('[{"known_id": "x", "prompt": "a is", "subject": "a", "attribute": "b"}]', "record 0 .* 'known_id' is 'x'"),
        ('[{"known_id": 7, "prompt": "c is", "subject": "a", "attribute": "b"}]', "known_id 7.*'a' does not occur"),
        (
            '[{"known_id": 7, "prompt": "a is", "subject": "a", "attribute": "b"},'
            ' {"known_id": 7, "prompt": "a is", "subject": "a", "attribute": "b"}]',
            "records 0 and 1 .* same known_id 7",
        ),
    ],
)
def test_bad_facts_files_are_named(model: ke.EditableModel, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        ke.trace_dataset(model, path, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_fact_that_cannot_be_traced_is_named_before_anything_is_written(
    model: ke.EditableModel, tmp_path: Path
) -> None:
    long = {"known_id": 5, "prompt": "Ann is " + "very " * 200 + "a", "subject": "Ann", "attribute": "b"}
    with pytest.raises(ValueError, match="known_id 5.*128 positions"):
        ke.trace_dataset(model, [known_facts()[9], long], tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="unknown kind 'stat'"):
        ke.trace_dataset(model, known_facts()[:1], tmp_path / "out", kinds=("stat",), progress=False)
    assert not (tmp_path / "out").exists()


def test_known_1000(data_dir: Path) -> None:
    known = load_known(data_dir / "known_1000.json")
    assert len(known) == 1209
    for item, record in zip(known, json.loads((data_dir / "known_1000.json").read_text()), strict=True):
        assert item.fact.text == record["prompt"]
        assert item.fact.subject_chars()[0] == record["prompt"].index(record["subject"])
