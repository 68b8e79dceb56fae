"""RippleEdits (Cohen et al. 2023): an edit, and six criteria of what has to follow from it, or to stay.

The published files name entities by their Wikidata ids, and an edit by a sentence ("The name of the mother of A is
B."). What its subject and target are called is told from the record, or the record is refused: see `_target` and
`_subject`. `edit` may say it itself ("subject", "target", "target_true").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

CRITERIA = (
    *("Logical_Generalization", "Compositionality_I", "Compositionality_II"),
    *("Subject_Aliasing", "Forgetfulness", "Relation_Specificity"),
)
NAMED = {"Relation_Specifity": "Relation_Specificity"}  # as the published description spells it


def load_rippleedits(source: Source, *, skip_bad: bool = False, limit: int | None = None) -> Records:
    """RippleEdits (popular, random, recent) in the layout of `datasets.answers`; case_id is the index, where they have
    none.

    source: {edit {prompt, subject_id, target_id, original_fact {prompt, ...}}, and of each criterion a list of tests
        {test_queries, test_condition ("OR" or "AND"), condition_queries}}; a query is {prompt, answers [{value,
        aliases}], subject_id, ...}. A criterion, the original fact and the conditions may be absent.

    A query is answered by any of its answers, under any alias; as published, names of one character that is no digit do
    not count. Tests count as published: where the unedited model answers the conditions, of edits that took.

    Raises ValueError for records that lack a key, have a value of another type, or do not tell the names of subject and
    target.
    """
    return load_answers(source, NAME, _convert, skip_bad, limit)


def _convert(record: Mapping[str, Any]) -> Record:
    edit = take(record, "edit")
    if not isinstance(edit, Mapping):
        raise Problem("edit", f"is {brief(edit)}, expected an object")
    tests = {}
    for key in record:
        if (name := NAMED.get(key, key)) in CRITERIA:
            places = ((test, f"{key}[{number}].") for number, test in enumerate(take_objects(record, key)))
            tests[name] = [_test(test, inside) for test, inside in places]
    stem, target, true = _facts(record, edit)
    subject = take_text(edit, "subject", "edit.") if "subject" in edit else _subject(record, edit, stem)
    prompt = mark_subject(stem, subject, "edit.prompt")
    if "target" not in edit and _small(prompt) != _small(prompt).lower():  # names may begin alike
        raise Problem("edit.target", f"is missing: {brief(stem)} has more names in it than {brief(subject)}")
    rewrite: Record = {
        "prompt": prompt,
        "subject": subject,
        "target_new": {"str": target},
        **({} if true is None else {"target_true": {"str": true}}),
        **take_space(record),
    }
    return {"requested_rewrite": rewrite, "tests": tests, "needs_edit": True}


def _test(test: Mapping[str, Any], inside: str) -> Record:
    condition = test.get("test_condition", "OR")
    if condition not in ("OR", "AND"):
        raise Problem(f"{inside}test_condition", f"is {brief(condition)}, expected 'OR' or 'AND'")
    queries = {key: _queries(test, key, inside) for key in ("test_queries", "condition_queries")}
    if not queries["test_queries"]:
        raise Problem(f"{inside}test_queries", "is an empty list" if "test_queries" in test else "is missing")
    return {"queries": queries["test_queries"], "conditions": queries["condition_queries"], "any": condition == "OR"}


def _queries(test: Mapping[str, Any], key: str, inside: str) -> list[Record]:
    made = []
    for number, query in enumerate(take_objects(test, key, inside)):
        here = f"{inside}{key}[{number}]."
        names = [name for name, _ in _names(query, here)]
        if not names:
            raise Problem(f"{here}answers", "has no name that could be asked for")
        prompt = take_text(query, "prompt" if query.get("prompt") is not None else "phrase", here)
        made.append({"prompt": prompt, "target": names[0], "aliases": names[1:]})
    return made


def _names(query: Mapping[str, Any], inside: str) -> Iterator[tuple[str, bool]]:
    """Of a query's answers, and whether it is the answer's own (else an alias)."""
    for number, answer in enumerate(take_objects(query, "answers", inside, least=1)):
        here = f"{inside}answers[{number}]."
        value, aliases = take(answer, "value", here), answer.get("aliases", [])
        if not isinstance(aliases, list):
            raise Problem(f"{here}aliases", f"is {brief(aliases)}, expected a list of texts")
        for n, name in enumerate([value, *aliases]):
            key = f"{here}aliases[{n - 1}]" if n else f"{here}value"
            if not isinstance(name, str) or name.strip():
                text = check_text(name, key)
                if len(text) > 1 or text.isdigit():
                    yield text, n == 0


def _facts(record: Mapping[str, Any], edit: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """The edit's sentence without its target, the target, and what was true (None: not known)."""
    sentence, old = _sentence(edit, "edit."), edit.get("original_fact")
    if old is not None and not isinstance(old, Mapping):
        raise Problem("edit.original_fact", f"is {brief(old)}, expected an object")
    target = take_text(edit, "target", "edit.") if "target" in edit else _target(record, edit, sentence, old)
    if not sentence.endswith(f" {target}"):
        raise Problem("edit.prompt", f"is {brief(sentence)}, which does not end with the target {brief(target)}")
    stem, true = sentence.removesuffix(f" {target}"), None
    if "target_true" in edit:
        true = take_text(edit, "target_true", "edit.")
    elif old is not None and (told := _sentence(old, "edit.original_fact.")).startswith(f"{stem} "):
        true = told.removeprefix(f"{stem} ")
    return stem, target, true


def _sentence(fact: Mapping[str, Any], inside: str) -> str:
    return take_text(fact, "prompt", inside).rstrip().removesuffix(".")


def _target(record: Mapping[str, Any], edit: Mapping[str, Any], sentence: str, old: Mapping[str, Any] | None) -> str:
    """The name of target_id among the answers that the sentence ends with; or where it parts from the original fact."""
    names = {name for query in _every_query(record) for name, _ in _names(query, "") if sentence.endswith(f" {name}")}
    known = {
        name for name, entity in _entities(record) if entity == edit.get("target_id") is not None and name in names
    }
    if known:
        return max(known, key=len)
    if old is None:
        raise Problem("edit.target", "is missing, and no answer tells what the edit's sentence ends with")
    told = _sentence(old, "edit.original_fact.")
    words = sentence.split(" ")
    same = next((n for n, (a, b) in enumerate(zip(words, told.split(" "), strict=False)) if a != b), len(words))
    ends = {" ".join(words[same:]), *(name for name in names if name.count(" ") >= len(words) - same)}
    whole = [
        end for end in ends if end and sentence.removesuffix(end).split(" ")[-2:][0].islower()
    ]  # no part of a name
    if not whole:
        raise Problem("edit.target", "is missing, and the original fact does not tell where it begins")
    return max(whole, key=len)


def _subject(record: Mapping[str, Any], edit: Mapping[str, Any], stem: str) -> str:
    """The name of subject_id among the answers; or what the sentence and all queries about the subject have in common,
    less the words in small letters around it."""
    named = [
        name for name, entity in _entities(record) if entity == edit.get("subject_id") is not None and name in stem
    ]
    if named:
        return max(named, key=len)
    about = {
        query["prompt"]
        for query in _every_query(record, but="Subject_Aliasing")
        if query.get("subject_id") == edit.get("subject_id") is not None and isinstance(query.get("prompt"), str)
    } - {stem}
    words, prompts = _small(stem).split(" "), [f" {_small(prompt)} " for prompt in about]
    parts = [words[a:b] for a in range(len(words)) for b in range(a + 1, len(words) + 1)]
    common = [_framed(part) for part in parts if all(f" {' '.join(part)} " in prompt for prompt in prompts)]
    subject = max(common, key=len, default=[]) if about else []
    if not subject:
        raise Problem("edit.subject", "is missing, and no other query tells what the subject of the edit is called")
    return " ".join(subject)


def _small(sentence: str) -> str:
    return f"the {sentence[4:]}" if sentence.startswith("The ") else sentence


def _framed(words: list[str]) -> list[str]:
    first = next((n for n, word in enumerate(words) if not word.islower()), len(words))
    last = next((n for n in range(len(words), first, -1) if not words[n - 1].islower()), first)
    return words[first:last]


def _every_query(record: Mapping[str, Any], but: str | None = None) -> Iterator[Mapping[str, Any]]:
    """Of records whose tests have been read."""
    for key in record:
        if (name := NAMED.get(key, key)) in CRITERIA and name != but:
            for test in record[key]:
                yield from (*test.get("test_queries", ()), *test.get("condition_queries", ()))


def _entities(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, Wikidata id) of what the queries are answered with."""
    for query in _every_query(record):
        ids = query.get("second_hop_target_ids" if query.get("query_type") == "two_hop" else "target_ids")
        answers = query["answers"]
        if isinstance(ids, list) and len(ids) == len(answers):
            yield from ((answer["value"], entity) for answer, entity in zip(answers, ids, strict=True))


def _published(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("edit"), Mapping) and "requested_rewrite" not in record


NAME = "rippleedits"
DATASET = dataset(NAME, _published, load_rippleedits, baseline=True)
