"""What CounterFact records tell, as statements with known subjects, and training documents made of them."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knowedit_ext.world.generate import Document

RECORDS = "counterfact_350.json"
FLAT = ("counterfact-edit.json", "counterfact-train.json", "counterfact-val.json")
PROSE = "wikitext2_test.raw"


@dataclass(frozen=True)
class Statement:
    """``prefix`` (may be empty), then ``template`` with the subject in place of ``{}``, then `` object.``."""

    template: str
    subject: str
    object: str
    prefix: str = ""

    def prompt(self) -> str:
        return " ".join(filter(None, (self.prefix, self.template.replace("{}", self.subject))))


@dataclass
class Knowledge:
    """What the records ask for, and what else is stated so that a fact does not hang on one wording."""

    asked: list[Statement] = field(default_factory=list)  # the records' own prompts
    facts: list[tuple[str, str, str]] = field(default_factory=list)  # (relation id, subject, object), each once
    templates: dict[str, list[str]] = field(default_factory=dict)  # relation id -> templates
    prose: list[str] = field(default_factory=list)  # sentences that tell nothing of the facts
    unmatched: list[str] = field(default_factory=list)  # prompts that fit no template: left out
    dropped: int = 0  # statements of another object than the one that a record says is true


def read_data(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """The complete records, the flat ones (for their templates) and running prose.

    Raises:
        FileNotFoundError: a file is not there; says which and where it was looked for.
    """
    for name in (RECORDS, *FLAT, PROSE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: give the folder of the real data by --data")
    records = json.loads((folder / RECORDS).read_text(encoding="utf-8"))
    flat = [record for name in FLAT for record in json.loads((folder / name).read_text(encoding="utf-8"))]
    return records, flat, (folder / PROSE).read_text(encoding="utf-8")


class Templates:
    """Prompt templates; the one with the longest fixed text wins where several fit."""

    def __init__(self, templates: set[str]) -> None:
        self.parts = sorted(
            ((before, after) for before, _, after in (t.partition("{}") for t in templates)),
            key=lambda part: (-len(part[0]) - len(part[1]), part),
        )

    def subject(self, prompt: str) -> tuple[str, str] | None:
        """Template and subject of a whole prompt."""
        for before, after in self.parts:
            subject = prompt[len(before) : len(prompt) - len(after)]
            if subject and prompt == before + subject + after:
                return before + "{}" + after, subject
        return None

    def prefix(self, prompt: str, subject: str) -> tuple[str, str] | None:
        """Prefix and template of a prompt that ends in a statement about ``subject``."""
        for before, after in self.parts:
            if prompt.endswith(before + subject + after):
                return prompt[: len(prompt) - len(before + subject + after)].strip(), before + "{}" + after
        return None


def collect(records: list[dict], flat: list[dict], prose: str) -> Knowledge:
    """Read the statements off the records. A subject whose true object a record gives keeps only that object."""
    rewrites = [record["requested_rewrite"] for record in records]
    templates = Templates({r["prompt"].replace(r["subject"], "{}", 1) for r in flat} | {r["prompt"] for r in rewrites})
    true = {(r["relation_id"], r["subject"]): r["target_true"]["str"] for r in rewrites}
    known = Knowledge(prose=sentences(prose))
    wordings, facts = defaultdict(set), set()

    def state(relation: str, statement: Statement) -> None:
        if true.get((relation, statement.subject), statement.object) != statement.object:
            known.dropped += 1
            return
        known.asked.append(statement)
        wordings[relation].add(statement.template)
        facts.add((relation, statement.subject, statement.object))

    for record, rewrite in zip(records, rewrites, strict=True):
        relation, subject = rewrite["relation_id"], rewrite["subject"]
        old, new = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
        state(relation, Statement(rewrite["prompt"], subject, old))
        for prompt in record["paraphrase_prompts"]:
            if match := templates.prefix(prompt, subject):
                state(relation, Statement(match[1], subject, old, match[0]))
                known.prose.append(match[0])
            else:
                known.unmatched.append(prompt)
        others = [(p, old) for p in record["neighborhood_prompts"]] + [(p, new) for p in record["attribute_prompts"]]
        for prompt, answer in others:
            if match := templates.subject(prompt):
                state(relation, Statement(*match, answer))
            else:
                known.unmatched.append(prompt)
    known.asked = list(dict.fromkeys(known.asked))
    known.prose = [text for text in dict.fromkeys(known.prose) if text]
    known.facts = sorted(facts)
    known.templates = {relation: sorted(texts) for relation, texts in sorted(wordings.items())}
    return known


def sentences(prose: str, shortest: int = 5, longest: int = 14) -> list[str]:
    """The short sentences of tokenised prose."""
    parts = (part.strip() for line in prose.splitlines() if "=" not in line for part in line.split(" . "))
    return [f"{part}." for part in parts if shortest <= len(part.split()) <= longest and part[0].isupper()]


class Documents:
    """An endless, seeded stream in which each prompt of the records, and each fact in another wording, comes up
    equally often. Unrelated sentences stand before a part of the statements, and alone now and then."""

    def __init__(self, known: Knowledge, seed: int, reworded: int = 1, prefixed: float = 0.35) -> None:
        self.known, self.reworded, self.prefixed = known, reworded, prefixed
        self.rng = random.Random(f"documents {seed}")
        self._deck: list[Statement] = []

    def _next_statement(self) -> Statement:
        if not self._deck:
            self._deck = list(self.known.asked)
            for relation, subject, answer in self.known.facts:
                for template in self.rng.choices(self.known.templates[relation], k=self.reworded):
                    self._deck.append(Statement(template, subject, answer))
            self.rng.shuffle(self._deck)
        return self._deck.pop()

    def _prefix(self, statement: Statement) -> str | None:
        if statement.prefix and self.rng.random() < 0.6:
            return statement.prefix
        return self.rng.choice(self.known.prose) if self.rng.random() < self.prefixed else None

    def __iter__(self) -> Iterator[Document]:
        while True:
            doc = Document()
            if self.rng.random() < 0.05:
                for _ in range(self.rng.randint(1, 3)):
                    doc.add(self.rng.choice(self.known.prose), None, None)
            else:
                for _ in range(self.rng.choice((1, 1, 2))):
                    statement = self._next_statement()
                    if prefix := self._prefix(statement):
                        doc.add(prefix, None, None)
                    doc.add(statement.template, statement.subject, statement.object)
            yield doc
