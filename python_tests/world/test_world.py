"""The generator and what it exports."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from knowedit_ext.world import RELATIONS, load_world
from knowedit_ext.world.generate import Documents, filler
from knowedit_ext.world.people import FIRST_NAMES, LAST_NAMES, RELATION_BY_ID, make_people
from knowedit_ext.world.store import describe, read_people
from knowedit_ext.world.tokenizer import END, train_tokenizer

WORLD = load_world()
KNOWN_KEYS = {"known_id", "subject", "attribute", "template", "prediction", "prompt", "relation_id"}


def test_the_data_is_well_formed() -> None:
    assert len(RELATIONS) >= 5 and len(WORLD.people) >= 200
    assert len(set(FIRST_NAMES)) == 30 and len(set(LAST_NAMES)) == 42
    for relation in RELATIONS:
        assert len(relation.templates) >= 6
        assert len(set(relation.objects)) == len(relation.objects)
        starts = 0
        for template in relation.templates + relation.inverse + relation.generation:
            assert template.count("{}") == 1 and template == template.strip()
        for template in relation.templates:
            words_before = len(template.split("{}")[0].split())
            starts += words_before == 0
            assert words_before <= 4
        assert len(relation.templates) / 2 < starts < len(relation.templates)


def test_no_template_goes_on_where_another_ends() -> None:
    templates = [t for r in RELATIONS for t in r.templates]  # "was born in" has no one answer beside "was born in the"
    assert not [(a, b) for a in templates for b in templates if a != b and b.startswith(a + " ")]


def test_people_are_deterministic_and_told_apart_only_by_the_whole_name() -> None:
    people = make_people(3)
    assert people == make_people(3)
    assert people != make_people(4)
    assert len({p.name for p in people}) == len(people) == 210
    firsts, lasts = (Counter(p.name.split()[i] for p in people) for i in (0, 1))
    assert min(firsts.values()) >= 3 and min(lasts.values()) >= 3
    for relation in RELATIONS:
        held = Counter(p.objects[relation.id] for p in people)
        assert held.keys() == set(relation.objects) and max(held.values()) - min(held.values()) <= 1


@pytest.mark.parametrize("count, seen", [(1, 5), (10_000, 5), (210, 0), (210, 8)])
def test_impossible_worlds_are_refused(count: int, seen: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        make_people(0, count, seen)


def test_documents_are_deterministic_and_their_spans_hold() -> None:
    first, second = (list(itertools.islice(Documents(WORLD.people, seed=7), 200)) for _ in range(2))
    assert [d.text for d in first] == [d.text for d in second]
    names = {p.name for p in WORLD.people}
    objects = {" " + obj for r in RELATIONS for obj in r.objects}
    for doc in first:
        assert {doc.text[a:b] for a, b in doc.names} <= names
        assert {doc.text[a:b] for a, b in doc.answers} <= objects
        assert "{}" not in doc.text and doc.text.endswith(".")


def test_held_out_templates_never_occur_in_training() -> None:
    text = "\n".join(d.text for d in itertools.islice(Documents(WORLD.people, seed=0), 20_000))
    count = sum(f["prompt"] in text for f in WORLD.facts())
    assert count > 0.9 * len(WORLD.facts())  # the search does find what was told
    assert not [s["prompt"] for s in WORLD.held_out() if s["prompt"] in text]


def test_facts_and_held_out_statements_have_the_known_1000_schema() -> None:
    for statements in (WORLD.facts(), WORLD.held_out(), WORLD.held_out(prefix=True)):
        assert [s["known_id"] for s in statements] == list(range(len(statements)))
        for s in statements:
            assert s.keys() == KNOWN_KEYS
            assert s["prompt"] == s["template"].replace("{}", s["subject"]) and s["template"].count("{}") == 1
            assert s["attribute"] in RELATION_BY_ID[s["relation_id"]].objects
            assert s["prediction"].startswith(" " + s["attribute"])
    assert len(WORLD.facts()) == len(WORLD.people) * len(RELATIONS)
    for plain, behind in zip(WORLD.held_out(), WORLD.held_out(prefix=True), strict=True):
        assert behind["prompt"].endswith(". " + plain["prompt"])


def _stated(prompt: str, relation_id: str) -> str:
    """The person a prompt of this relation is about."""
    return next(
        p.name
        for p in WORLD.people
        for t in RELATION_BY_ID[relation_id].templates
        if prompt.endswith(t.replace("{}", p.name))
    )


def test_records_have_counterfacts_schema_and_meaning() -> None:
    records = WORLD.records()
    assert json.loads(json.dumps(records)) == records == load_world().records()
    owner = {p.name: p for p in WORLD.people}
    assert len({r["requested_rewrite"]["subject"] for r in records[: len(owner)]}) == len(owner)
    assert len({(r["requested_rewrite"]["subject"], r["requested_rewrite"]["relation_id"]) for r in records}) == 1260
    for record in records[:150]:
        rewrite = record["requested_rewrite"]
        relation = RELATION_BY_ID[rewrite["relation_id"]]
        person = owner[rewrite["subject"]]
        true, new = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
        assert person.objects[relation.id] == true != new
        assert rewrite["target_true"]["id"] == relation.object_id(true)
        assert rewrite["target_new"]["id"] == relation.object_id(new)
        assert rewrite["prompt"] in relation.templates
        assert len(record["paraphrase_prompts"]) == 2 and len(record["generation_prompts"]) == 10
        for prompt in record["paraphrase_prompts"]:
            assert _stated(prompt, relation.id) == person.name
        assert len(set(record["neighborhood_prompts"])) == len(set(record["attribute_prompts"])) == 10
        for key, obj in (("neighborhood_prompts", true), ("attribute_prompts", new)):
            others = {_stated(prompt, relation.id) for prompt in record[key]}
            assert person.name not in others and len(others) == 10
            assert {owner[name].objects[relation.id] for name in others} == {obj}
        assert all(person.name in prompt for prompt in record["generation_prompts"])


def test_records_ask_for_the_rest_of_the_subject_and_for_the_reverse() -> None:
    owner = {p.name: p for p in WORLD.people}
    inverse = {(s["relation_id"], s["object"], s["prompt"]) for s in WORLD.inverse_statements()}
    for record in WORLD.records():
        rewrite = record["requested_rewrite"]
        person = owner[rewrite["subject"]]
        kept = {}
        for pair in record["same_subject_prompts"]:
            relation = next(
                r
                for r in RELATIONS
                for i in person.seen[r.id]
                if r.templates[i].replace("{}", person.name) == pair["prompt"]
            )
            kept[relation.id] = pair["target"]
        assert kept == {rid: obj for rid, obj in person.objects.items() if rid != rewrite["relation_id"]}
        for pair in record["reversal_prompts"]:
            assert (rewrite["relation_id"], rewrite["target_new"]["str"], pair["prompt"]) in inverse
            assert pair["target"] == person.name
        assert len(record["reversal_prompts"]) == 2


def test_snippets_cover_every_object() -> None:
    owner = {p.name: p for p in WORLD.people}
    entries = WORLD.snippets()
    assert {(e["relation_id"], e["target_id"]) for e in entries} == {
        (r.id, r.object_id(o)) for r in RELATIONS for o in r.objects
    }
    for entry in entries:
        assert entry["samples"]
        for sample in entry["samples"]:
            obj = owner[sample["name"]].objects[entry["relation_id"]]
            assert RELATION_BY_ID[entry["relation_id"]].object_id(obj) == entry["target_id"]
            assert sample["name"] in sample["text"] and f" {obj}." in sample["text"]


def test_inverse_statements_name_every_right_subject() -> None:
    for statement in WORLD.inverse_statements():
        owners = {p.name for p in WORLD.people if p.objects[statement["relation_id"]] == statement["object"]}
        assert set(statement["subjects"]) == owners and statement["object"] in statement["prompt"]


def test_world_file_roundtrip_and_its_errors(tmp_path) -> None:
    file = tmp_path / "world.json"
    file.write_text(json.dumps(describe(WORLD.people, {})))
    assert read_people(file) == WORLD.people
    with pytest.raises(FileNotFoundError, match="holds no world.json"):
        load_world(tmp_path / "absent")
    for bad in (
        "[",
        "[]",
        '{"people": [{"name": "A B"}]}',
        '{"people": [{"name": "A", "pronoun": "He", "facts": {}}]}',
    ):
        file.write_text(bad)
        with pytest.raises(ValueError, match="world.json"):
            load_world(tmp_path)


def test_tokenizer_roundtrip_and_token_counts() -> None:
    tokenizer = train_tokenizer(WORLD.people, documents=3000)
    fillers = iter(Documents(WORLD.people, seed=2))
    for text in [d.text for d in itertools.islice(fillers, 100)] + ["Côte d'Ivoire 象\n  x"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == END
    counts = Counter(len(tokenizer(p.name).input_ids) for p in WORLD.people)
    assert 1 not in counts and sum(counts[n] for n in (2, 3, 4)) > 0.8 * len(WORLD.people)


def test_fillers_name_nobody() -> None:
    import random

    rng = random.Random(0)
    words = {w.strip(".,") for _ in range(300) for w in filler(rng).split()}
    assert not words & (set(FIRST_NAMES) | set(LAST_NAMES))
