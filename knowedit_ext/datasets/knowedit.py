"""KnowEdit (WikiRecent, WikiCounterFact, WikiBio, ZsRE) as EasyEdit reads it (easyeditor/dataset/knowedit.py): facts
with groups of portability and locality questions."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as brief
from typing import Any

from .answers import dataset, load_answers
from .records import (
    Problem,
    Record,
    Records,
    Source,
    check_text,
    mark_subject,
    take,
    take_objects,
    take_space,
    take_text,
)

# The names of the groups, in lower case, and where their questions go; others are portability, or neighbours.
GROUPS = {
    "portability": {
        "subject_aliasing": "subject_aliasing_prompts",
        "reasoning": "reasoning_prompts",
        "logical_generalization": "logical_generalization_prompts",
    },
    "locality": {
        "relation_specificity": "relation_specificity_prompts",
        "forgetfulness": "forgetfulness_prompts",
    },
}
OTHERS = {"portability": "portability_prompts", "locality": "neighborhood_prompts"}
NAMES = {  # what a key is called in one file or another
    "subject": ("subject", "concept"),
    "prompt": ("prompt", "text"),
    "target_new": ("target_new", "labels"),
}


def load_knowedit(source: Source, *, skip_bad: bool = False, limit: int | None = None) -> Records:
    """KnowEdit's records in the layout of `datasets.answers`; case_id is the index, where they have none.

    source: {subject (concept), prompt (text), target_new (labels), ground_truth, rephrase_prompt (rephrase),
        portability {Subject_Aliasing, Reasoning, Logical_Generalization}, locality {Relation_Specificity,
        Forgetfulness}}, of which all but the first three may be absent; a group is a list of {prompt, ground_truth}.
        An answer is a text, a list of texts, or a list of lists of them: the first is the answer, all others are
        aliases of it, which count too. Groups of other names are asked as portability, or as neighbours.

    Raises ValueError for records that lack a key, have a value of another type, or whose prompt does not have the
    subject exactly once. Sanitation and ConvSent have no subjects, and are not read.
    """
    return load_answers(source, NAME, _convert, skip_bad, limit)


def _convert(record: Mapping[str, Any]) -> Record:
    prompt_key, subject_key = _key(record, "prompt"), _key(record, "subject")
    subject = take_text(record, subject_key)
    new = _answers(record, _key(record, "target_new"))
    rewrite: Record = {
        "prompt": mark_subject(take_text(record, prompt_key), subject, prompt_key),
        "subject": subject,
        "target_new": {"str": new[0], **({"aliases": new[1:]} if new[1:] else {})},
        **take_space(record),
    }
    if record.get("ground_truth") is not None:
        rewrite["target_true"] = {"str": _answers(record, "ground_truth")[0]}
    rephrase = next((key for key in ("rephrase_prompt", "rephrase") if record.get(key) is not None), None)
    converted: Record = {
        "requested_rewrite": rewrite,
        "paraphrase_prompts": [] if rephrase is None else [take_text(record, rephrase)],
    }
    for kind in GROUPS:
        for sort, pair in _questions(record, kind):
            converted.setdefault(sort, []).append(pair)
    return converted


def _key(record: Mapping[str, Any], name: str) -> str:
    """What the record calls it."""
    first, other = NAMES[name]
    if first not in record and other not in record:
        raise Problem(first, f"is missing, and so is '{other}'")
    return first if first in record else other


def _questions(record: Mapping[str, Any], kind: str) -> list[tuple[str, Record]]:
    groups = record.get(kind)
    if groups is None:
        return []
    if not isinstance(groups, Mapping):
        raise Problem(kind, f"is {brief(groups)}, expected an object of groups of questions")
    questions = []
    for name in groups:
        if not isinstance(name, str):
            raise Problem(kind, f"has a group called {brief(name)}, expected text")
        sort = GROUPS[kind].get(name.lower(), OTHERS[kind])
        for number, item in enumerate(take_objects(groups, name, f"{kind}.")):
            inside = f"{kind}.{name}[{number}]."
            first, *aliases = _answers(item, "ground_truth", inside)
            prompts = take(item, "prompt", inside)
            for prompt in prompts if isinstance(prompts, list) else [prompts]:
                pair = {"prompt": check_text(prompt, f"{inside}prompt"), "target": first}
                questions.append((sort, pair | ({"aliases": aliases} if aliases else {})))
    return questions


def _answers(record: Mapping[str, Any], key: str, inside: str = "") -> list[str]:
    """The texts of an answer, however deep they lie in lists, each once."""
    value = take(record, key, inside)
    flat = (
        [text for part in value for text in (part if isinstance(part, list) else [part])]
        if isinstance(value, list)
        else [value]
    )
    if not flat:
        raise Problem(inside + key, "is an empty list")
    named = [text for text in flat if not isinstance(text, str) or text.strip()] or flat[:1]  # an empty alias is none
    return list(dict.fromkeys([check_text(text, inside + key) for text in named]))


def _published(record: Mapping[str, Any]) -> bool:
    if "requested_rewrite" in record or "src" in record:
        return False
    grouped = any(isinstance(record.get(kind), Mapping) for kind in GROUPS)
    listed = any(isinstance(record.get(key), list) for key in ("target_new", "ground_truth"))
    biography = "concept" in record and "labels" in record
    bare = "target_new" in record and "case_id" not in record and "locality_prompt" not in record
    return grouped or biography or bare or ("target_new" in record and listed)


NAME = "knowedit"
DATASET = dataset(NAME, _published, load_knowedit)
