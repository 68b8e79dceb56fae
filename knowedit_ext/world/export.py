"""The world's facts in the published file formats: known_1000, CounterFact and its attribute snippets."""

from __future__ import annotations

import random
from collections.abc import Iterator

from .generate import filler
from .people import RELATION_BY_ID, RELATIONS, Person, Relation

PROMPTS_PER_LIST = 10  # neighbourhood, attribute and generation prompts of a CounterFact record
SNIPPETS_PER_OBJECT = 10


def _known(number: int, person: Person, relation: Relation, template: str, prefix: str = "") -> dict:
    obj = person.objects[relation.id]
    template = prefix + template
    return {
        "known_id": number,
        "subject": person.name,
        "attribute": obj,
        "template": template,
        "prediction": f" {obj}.",
        "prompt": template.replace("{}", person.name),
        "relation_id": relation.id,
    }


def _shuffled_facts(people: list[Person]) -> list[tuple[Person, Relation]]:
    """All (person, relation) pairs in a fixed mixed order: every person once before anyone comes again.

    So the first ``len(people)`` records can be edited together without two edits of one subject.
    """
    rng = random.Random("order of facts")
    order = {p.name: rng.sample(RELATIONS, len(RELATIONS)) for p in people}
    return [(p, order[p.name][turn]) for turn in range(len(RELATIONS)) for p in rng.sample(people, len(people))]


def rewrite_template(person: Person, relation: Relation) -> str:
    """The template that states this fact in ``facts`` and ``records``: one of those met in training."""
    return relation.templates[random.Random(f"{person.name} {relation.id}").choice(person.seen[relation.id])]


def held_out_templates(person: Person, relation: Relation) -> list[str]:
    """The templates of the relation that training never used for this person, not even inside a longer one."""
    seen = [relation.templates[i] for i in person.seen[relation.id]]
    return [t for t in relation.templates if not any(t in met for met in seen)]


def facts(people: list[Person]) -> list[dict]:
    """One known_1000 record per person and relation, with a template met in training."""
    return [_known(i, p, r, rewrite_template(p, r)) for i, (p, r) in enumerate(_shuffled_facts(people))]


def held_out(people: list[Person], prefix: bool = False) -> list[dict]:
    """known_1000 records of every fact with every template never seen for that person and relation.

    With ``prefix`` an unrelated sentence stands in front.
    """
    rng = random.Random("held out")
    statements = ((p, r, t) for p, r in _shuffled_facts(people) for t in held_out_templates(p, r))
    return [_known(i, p, r, t, prefix=filler(rng) + " " if prefix else "") for i, (p, r, t) in enumerate(statements)]


def _prompts_about(people: list[Person], relation: Relation, rng: random.Random) -> list[str]:
    """Prompts of the relation with templates met in training: distinct people first, at most ten."""
    order = rng.sample(people, len(people))
    choices = {p.name: rng.sample(p.seen[relation.id], len(p.seen[relation.id])) for p in order}
    rounds = max((len(c) for c in choices.values()), default=0)
    prompts = [
        relation.templates[choices[p.name][turn]].replace("{}", p.name)
        for turn in range(rounds)
        for p in order
        if turn < len(choices[p.name])
    ]
    return prompts[:PROMPTS_PER_LIST]


def _record(case: int, person: Person, relation: Relation, people: list[Person]) -> dict:
    rng = random.Random(case)
    true = person.objects[relation.id]
    new = rng.choice(sorted({p.objects[relation.id] for p in people} - {true}))
    owners: dict[str, list[Person]] = {true: [], new: []}
    for other in people:
        if other is not person and other.objects[relation.id] in owners:
            owners[other.objects[relation.id]].append(other)
    unseen = held_out_templates(person, relation)
    paraphrases = [t.replace("{}", person.name) for t in (unseen[0], unseen[-1])]
    generation = [t.replace("{}", person.name) for t in relation.generation]
    record = {
        "case_id": case,
        "pararel_idx": case,
        "requested_rewrite": {
            "prompt": rewrite_template(person, relation),
            "relation_id": relation.id,
            "target_new": {"str": new, "id": relation.object_id(new)},
            "target_true": {"str": true, "id": relation.object_id(true)},
            "subject": person.name,
        },
        "paraphrase_prompts": [f"{filler(rng)} {paraphrases[0]}", paraphrases[1]],
        "neighborhood_prompts": _prompts_about(owners[true], relation, rng),
        "attribute_prompts": _prompts_about(owners[new], relation, rng),
        "generation_prompts": [generation[i % len(generation)] for i in range(PROMPTS_PER_LIST)],
        "same_subject_prompts": same_subject_prompts(person, relation),
    }
    return {**record, "reversal_prompts": reversal_prompts(record)}


def same_subject_prompts(person: Person, relation: Relation) -> list[dict[str, str]]:
    """The person's other relations, each with a template met in training, and their true objects."""
    return [
        {
            "prompt": rewrite_template(person, other).replace("{}", person.name),
            "target": person.objects[other.id],
        }
        for other in RELATIONS
        if other is not relation
    ]


def reversal_prompts(record: dict) -> list[dict[str, str]]:
    """Who has the new object? The inverse templates of a record's relation; its subject is a right answer once edited.

    Not the only one: the people who had the object before are right too.
    """
    rewrite = record["requested_rewrite"]
    return [
        {"prompt": template.replace("{}", rewrite["target_new"]["str"]), "target": rewrite["subject"]}
        for template in RELATION_BY_ID[rewrite["relation_id"]].inverse
    ]


def records(people: list[Person]) -> list[dict]:
    """One CounterFact record per person and relation, in the order of ``facts``.

    Paraphrases use templates never seen for the fact, the first behind an unrelated sentence; the neighbourhood is
    other people with the same true object, the attribute prompts are people who have the new one. Two keys that the
    published files do not have, lists of {prompt, target}: `same_subject_prompts` and `reversal_prompts`.
    """
    return [_record(i, p, r, people) for i, (p, r) in enumerate(_shuffled_facts(people))]


def biography(person: Person) -> str:
    """All that is known of a person, in full sentences."""
    sentences = []
    for relation in RELATIONS:
        subject = person.pronoun if sentences else person.name
        # A pronoun inside a template would be "of He": take one that starts with the subject.
        template = next(relation.templates[i] for i in range(len(relation.templates)) if _fits(relation, i, person))
        sentences.append(f"{template.replace('{}', subject)} {person.objects[relation.id]}.")
    return " ".join(sentences)


def _fits(relation: Relation, index: int, person: Person) -> bool:
    starts = [i for i in person.seen[relation.id] if relation.templates[i].startswith("{}")]
    return index in starts if starts else relation.templates[index].startswith("{}")


def snippets(people: list[Person]) -> list[dict]:
    """Texts about the people who have an object, in the schema of CounterFact's ``attribute_snippets.json``."""

    def samples(relation: Relation, obj: str) -> Iterator[dict]:
        for person in people:
            if person.objects[relation.id] == obj:
                yield {"name": person.name, "text": biography(person)}

    return [
        {
            "relation_id": relation.id,
            "target_id": relation.object_id(obj),
            "samples": list(samples(relation, obj))[:SNIPPETS_PER_OBJECT],
        }
        for relation in RELATIONS
        for obj in relation.objects
    ]


def inverse_statements(people: list[Person]) -> list[dict]:
    """Prompts from object to subject: ``prompt``, ``relation_id``, ``object`` and all ``subjects`` that are right."""
    return [
        {
            "prompt": template.replace("{}", obj),
            "relation_id": relation.id,
            "object": obj,
            "subjects": [p.name for p in people if p.objects[relation.id] == obj],
        }
        for relation in RELATIONS
        for obj in relation.objects
        for template in relation.inverse
    ]
