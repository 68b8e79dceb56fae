"""The invented world as data: names, relations, objects and templates. No real person is meant."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

FIRST_NAMES = tuple(
    "Avelo Brinna Caltor Dorvy Elspar Farwen Gavrin Heskal Ilmora Jorvan Kestra Lumeno Mavrel Nelko Orsina Pelvar "
    "Quenta Ruskan Sorvel Tavira Ulmer Vennick Wendro Yarrin Zelmo Arvika Bolmer Cressa Drennor Elovar".split()
)
# Stem and ending are shared, so that a last name is two tokens and its last token alone names nobody.
LAST_NAMES = tuple(
    stem + ending
    for stem in "Ask Brak Cor Dul Fen Gril Thal".split()
    for ending in "mere holt sted vick rath lund".split()
)


@dataclass(frozen=True)
class Relation:
    """One attribute of a person. Every template holds one ``{}`` (the subject) and ends right before the object."""

    id: str  # the Wikidata property it is modelled on
    name: str
    objects: tuple[str, ...]  # without the leading space
    templates: tuple[str, ...]
    inverse: tuple[str, ...]  # ``{}`` is the object; they end right before a subject that has it
    generation: tuple[str, ...]  # open beginnings about the subject

    def object_id(self, obj: str) -> str:
        """The id of an object, e.g. ``P19.3``: ours, not a Wikidata item."""
        return f"{self.id}.{self.objects.index(obj)}"


@dataclass
class Person:
    """An invented person: the full name is needed to tell two people apart."""

    name: str
    pronoun: str  # "He" or "She"
    objects: dict[str, str] = field(default_factory=dict)  # relation id -> object
    seen: dict[str, tuple[int, ...]] = field(default_factory=dict)  # relation id -> templates met in training


def _words(text: str) -> tuple[str, ...]:
    return tuple(w.replace("_", " ") for w in text.split())


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "P1303",
        "instrument",
        _words("trumpet violin piano cello flute guitar harp banjo clarinet tuba organ double_bass"),
        (
            "{} plays the",
            "{} performs on the",
            "{} took lessons on the",
            "{} is known for playing the",
            "{} practises every day on the",
            "The instrument of {} is the",
            "On stage {} plays the",
            "In the band {} is heard on the",
        ),
        ("One who plays the {} is", "The {} is played by"),
        ("{} plays", "The instrument of {}", "On stage {}"),
    ),
    Relation(
        "P19",
        "place of birth",
        _words("Vienna Oslo Lisbon Athens Cairo Dublin Madrid Prague Warsaw Boston Tokyo New_Delhi"),
        (
            "{} was born in",
            "{} came into the world in",
            "{} spent the first years in",
            "{} was brought up in the city of",
            "{} went to school in",
            "The birthplace of {} is",
            "The home town of {} is",
            "As a child {} lived in",
        ),
        ("One who was born in {} is", "The city of {} is the birthplace of"),
        ("{} was born", "The birthplace of {}", "As a child {}"),
    ),
    Relation(
        "P103",
        "native language",
        _words("French Polish Greek Danish Turkish Arabic Spanish Dutch Korean Swedish Hindi Old_Norse"),
        (
            "{} grew up speaking",
            "{} has always spoken",
            "{} writes letters in",
            "{} thinks and dreams in",
            "{} learnt to read in",
            "The mother tongue of {} is",
            "The first language of {} is",
            "At home {} speaks",
        ),
        ("One who grew up speaking {} is", "The language {} is spoken by"),
        ("{} grew up", "The mother tongue of {}", "At home {}"),
    ),
    Relation(
        "P106",
        "profession",
        _words("baker teacher doctor lawyer farmer painter carpenter nurse pilot sailor tailor bus_driver"),
        (
            "{} works as a",
            "{} earns a living as a",
            "{} trained to become a",
            "{} has long been a",
            "{} found work as a",
            "The profession of {} is that of a",
            "By trade {} is a",
            "The neighbours know {} as a",
        ),
        ("One who works as a {} is", "The work of a {} is done by"),
        ("{} works", "The profession of {}", "By trade {}"),
    ),
    Relation(
        "P108",
        "employer",
        _words("Norvex Quillon Brantec Osmira Dovetel Kalmar Zentria Pexum Ruvio Altona Mirabel Gold_Harbour"),
        (
            "{} is employed by",
            "{} has a contract with",
            "{} gets a salary from",
            "{} joined the staff of",
            "{} has a desk at",
            "The employer of {} is",
            "The company that pays {} is",
            "Since last year {} has been paid by",
        ),
        ("One who is employed by {} is", "The company {} pays"),
        ("{} is employed", "The employer of {}", "Since last year {}"),
    ),
    Relation(
        "P641",
        "sport",
        _words("tennis rugby hockey chess golf cricket judo rowing boxing fencing sailing water_polo"),
        (
            "{} competes in",
            "{} trains hard at",
            "{} won a medal in",
            "{} has a talent for",
            "{} spends the weekend on",
            "The sport of {} is",
            "The favourite sport of {} is",
            "In summer {} takes part in",
        ),
        ("One who competes in {} is", "The sport of {} is practised by"),
        ("{} competes", "The sport of {}", "In summer {}"),
    ),
)
RELATION_BY_ID = {r.id: r for r in RELATIONS}


def make_people(seed: int = 0, count: int = 210, seen_templates: int = 5) -> list[Person]:
    """Invent ``count`` people with one object per relation; every object is given about equally often.

    Each name part is shared by several people, so that neither half of a name says who is meant. Of the templates of
    a relation, ``seen_templates`` are met in training for that person; the others are held out.
    """
    pairs = len(FIRST_NAMES) * len(LAST_NAMES)
    if not 2 <= count <= pairs // 2:
        raise ValueError(f"count must lie in 2..{pairs // 2}, not {count}")
    fewest = min(len(r.templates) for r in RELATIONS)
    if not 1 <= seen_templates < fewest:
        raise ValueError(f"seen_templates must lie in 1..{fewest - 1}, not {seen_templates}")
    rng = random.Random(seed)
    # Both lists are dealt out evenly, so every name part is shared and no pair comes twice.
    names: list[str] = []
    while len(names) < count:
        first, last = list(FIRST_NAMES) * 7, list(LAST_NAMES) * 5  # 210 of each
        rng.shuffle(first)
        rng.shuffle(last)
        for name in map(" ".join, zip(first, last, strict=True)):
            if name not in names and len(names) < count:
                names.append(name)
    people = [Person(name, rng.choice(("He", "She"))) for name in names]
    for relation in RELATIONS:
        deck = [relation.objects[i % len(relation.objects)] for i in range(count)]
        rng.shuffle(deck)
        for person, obj in zip(people, deck, strict=True):
            person.objects[relation.id] = obj
            person.seen[relation.id] = tuple(sorted(rng.sample(range(len(relation.templates)), seen_templates)))
    return people
