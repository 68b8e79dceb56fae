"""Training documents: statements, biographies and unrelated sentences, with the place of every name."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from .people import RELATIONS, Person, Relation

_SUBJECTS = "rain|snow|old bridge|river|garden|night train|market|tower|lake|wind|harbour|road|forest|winter".split("|")
_VERBS = "was quiet|lay still|seemed far away|looked grey|changed slowly|was full of light|felt cold|smelled of salt"
_VERBS = _VERBS.split("|")
_TIMES = "in the morning|that evening|for many days|after the storm|before noon|all year|in spring|at midnight"
_TIMES = _TIMES.split("|")
_THINGS = "a red coat|two apples|the last letter|some bread|a map of the coast|the green door|a small boat|three stones"
_THINGS = _THINGS.split("|")
_ACTS = "found|bought|remember|painted|lost|saw|counted|kept".split("|")
_LINKS = "Therefore|Because of this|In the end|For a while|Later|Then".split("|")


@dataclass
class Document:
    """A text with the character spans of the names in it and of the objects that its statements tell."""

    text: str = ""
    names: list[tuple[int, int]] = field(default_factory=list)  # [start, end) of every full name
    answers: list[tuple[int, int]] = field(default_factory=list)  # [start, end) of every object, leading space included

    def add(self, template: str, name: str | None, obj: str | None) -> None:
        """Append one sentence: ``template`` with ``{}`` filled by ``name``, then ``obj`` and a full stop."""
        if self.text:
            self.text += " "
        start = len(self.text)
        if name is None:
            self.text += template
        else:
            at = start + template.index("{}")
            self.text += template.replace("{}", name)
            if name not in ("He", "She"):
                self.names.append((at, at + len(name)))
        if obj is not None:
            self.answers.append((len(self.text), len(self.text) + 1 + len(obj)))
            self.text += f" {obj}."

    def add_inverse(self, template: str, obj: str, name: str) -> None:
        """Append a sentence that tells a subject of an object."""
        self.add(template.replace("{}", obj), None, None)
        self.names.append((len(self.text) + 1, len(self.text) + 1 + len(name)))
        self.text += f" {name}."


def filler(rng: random.Random) -> str:
    """A sentence that tells nothing about anybody."""
    kind = rng.randrange(5)
    if kind == 0:
        return f"The {rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_TIMES)}."
    if kind == 1:
        who = rng.choice(("I", "You", "We", "They"))
        return f"{who} {rng.choice(_ACTS)} {rng.choice(_THINGS)} {rng.choice(_TIMES)}."
    if kind == 2:
        return f"{rng.choice(_LINKS)} the {rng.choice(_SUBJECTS)} {rng.choice(_VERBS)}."
    if kind == 3:
        who = rng.choice(("I", "you", "we", "they"))
        cause = f"Because the {rng.choice(_SUBJECTS)} {rng.choice(_VERBS)}"
        return f"{cause}, {who} {rng.choice(_ACTS)} {rng.choice(_THINGS)}."
    return f"{rng.choice(_TIMES).capitalize()} the {rng.choice(_SUBJECTS)} {rng.choice(_VERBS)}."


class Documents:
    """An endless, seeded stream of documents in which every (fact, seen template) comes up equally often.

    Only templates of ``person.seen`` are used for a person, in biographies too: the others stay unseen.
    """

    def __init__(self, people: list[Person], seed: int) -> None:
        self.people = people
        self.rng = random.Random(seed)
        self._deck: list[tuple[Person, Relation, str]] = []

    def _next_fact(self) -> tuple[Person, Relation, str]:
        if not self._deck:
            self._deck = [(p, r, r.templates[i]) for p in self.people for r in RELATIONS for i in p.seen[r.id]]
            self.rng.shuffle(self._deck)
        return self._deck.pop()

    def _statements(self) -> Document:
        doc = Document()
        for _ in range(self.rng.choice((1, 2, 2, 3, 4))):
            draw = self.rng.random()
            if draw < 0.15:
                doc.add(filler(self.rng), None, None)
            elif draw < 0.19:
                person, relation = self.rng.choice(self.people), self.rng.choice(RELATIONS)
                doc.add_inverse(self.rng.choice(relation.inverse), person.objects[relation.id], person.name)
            elif draw < 0.22:
                person = self.rng.choice(self.people)
                doc.add("{} is a" + (" man." if person.pronoun == "He" else " woman."), person.name, None)
            else:
                person, relation, template = self._next_fact()
                doc.add(template, person.name, person.objects[relation.id])
        return doc

    def _biography(self) -> Document:
        doc = Document()
        if self.rng.random() < 0.3:
            doc.add(filler(self.rng), None, None)
        person, relation, template = self._next_fact()
        doc.add(template, person.name, person.objects[relation.id])
        others = [r for r in RELATIONS if r is not relation]
        for other in self.rng.sample(others, self.rng.randint(2, 4)):
            templates = [other.templates[i] for i in person.seen[other.id] if other.templates[i].startswith("{}")]
            if templates:
                doc.add(self.rng.choice(templates), person.pronoun, person.objects[other.id])
        return doc

    def __iter__(self) -> Iterator[Document]:
        while True:
            draw = self.rng.random()
            if draw < 0.05:
                doc = Document()
                for _ in range(self.rng.randint(2, 4)):
                    doc.add(filler(self.rng), None, None)
                yield doc
            elif draw < 0.30:
                yield self._biography()
            else:
                yield self._statements()
