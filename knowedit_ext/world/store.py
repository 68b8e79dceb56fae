"""``world.json`` and the loaded world."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from . import export
from .generate import filler
from .people import RELATION_BY_ID, RELATIONS, Person, Relation

WORLD = "world"  # the built-in world, wherever a model or a data file is named
SHIPPED = Path(__file__).parent / "checkpoint"
WORLD_FILE = "world.json"


def describe(people: list[Person], settings: dict) -> dict:
    """What ``world.json`` holds: the people with their objects and the templates met in training, and the settings."""
    return {
        "settings": settings,
        "people": [
            {
                "name": p.name,
                "pronoun": p.pronoun,
                "facts": {r.id: [p.objects[r.id], list(p.seen[r.id])] for r in RELATIONS},
            }
            for p in people
        ],
    }


def read_people(file: Path) -> list[Person]:
    """The people of a ``world.json``. ValueError names the file and what is wrong in it."""
    try:
        people = [
            Person(
                entry["name"],
                entry["pronoun"],
                {rid: obj for rid, (obj, _) in entry["facts"].items()},
                {rid: tuple(seen) for rid, (_, seen) in entry["facts"].items()},
            )
            for entry in json.loads(file.read_text(encoding="utf-8"))["people"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not the description of a world: {error!r}") from error
    for person in people:
        if person.objects.keys() != RELATION_BY_ID.keys():
            raise ValueError(f"{file}: the relations of {person.name!r} are {sorted(person.objects)}")
        for relation in RELATIONS:
            if person.objects[relation.id] not in relation.objects:
                raise ValueError(f"{file}: {person.objects[relation.id]!r} of {person.name!r} is no {relation.name}")
            if not set(person.seen[relation.id]) < set(range(len(relation.templates))):
                raise ValueError(f"{file}: {person.name!r} has impossible templates for {relation.name}")
    return people


@dataclass(frozen=True)
class World:
    """Invented people, what is known of them, and the folder of the model that knows it.

    Attributes:
        folder: loads with ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``.
        people: every person with one object per relation.
        relations: the relations with their templates.
    """

    folder: Path
    people: list[Person]
    relations: tuple[Relation, ...] = RELATIONS

    def facts(self) -> list[dict]:
        """known_1000 records, one per person and relation; the template was met in training."""
        return export.facts(self.people)

    def held_out(self, prefix: bool = False) -> list[dict]:
        """known_1000 records with templates never seen for that person and relation; ``prefix``: behind a sentence."""
        return export.held_out(self.people, prefix)

    def records(self) -> list[dict]:
        """CounterFact records, one per person and relation."""
        return export.records(self.people)

    def snippets(self) -> list[dict]:
        """Reference texts per relation and object, in the schema of ``attribute_snippets.json``."""
        return export.snippets(self.people)

    def statements(self) -> list[str]:
        """Sentences that state the facts, by templates met in training and others, in a fixed mixed order: the text for
        second moments."""
        texts = [f"{fact['prompt']} {fact['attribute']}." for fact in self.facts() + self.held_out(prefix=True)]
        random.Random(3).shuffle(texts)
        return texts

    def fillers(self, count: int = 40) -> list[str]:
        """Texts of five sentences that tell nothing about anybody: for a perplexity that no edit should change."""
        rng = random.Random(7)
        return [" ".join(filler(rng) for _ in range(5)) for _ in range(count)]

    def inverse_statements(self) -> list[dict]:
        """Prompts from an object to the people who have it."""
        return export.inverse_statements(self.people)


def load_world(folder: str | Path | None = None) -> World:
    """The shipped world, or one written by ``train``.

    Raises:
        FileNotFoundError: the folder holds no ``world.json``.
        ValueError: ``world.json`` is not a world of these relations.
    """
    folder = SHIPPED if folder is None else Path(folder)
    file = folder / WORLD_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {WORLD_FILE}: make a world with `knowedit world train --out DIR`")
    return World(folder, read_people(file))


def world_facts() -> list[dict]:
    """The built-in world's 1,260 facts as known_1000 records: what `trace_dataset` runs over."""
    return load_world().facts()


def world_records() -> list[dict]:
    """The built-in world's 1,260 CounterFact records: what methods edit and `evaluate` measures."""
    return load_world().records()
