"""zsRE in MEND's schema, mapped to records as published (rome dsets/zsre.py:31-56); and what is asked about a record:
teacher-forced accuracy of every token of an answer (eval_utils_zsre.py:46-120)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from reprlib import repr as brief
from typing import Any

from ..checks import quoted
from ..model.load import EditableModel
from ..model.spelling import spaced
from ..model.tokens import encode, encode_part
from .dataset import Dataset
from .questions import EXTRAS, Asked, Question, Scores, TokenizedQuestion, filled
from .records import (
    Problem,
    Record,
    Records,
    Source,
    check_pairs,
    check_rewrite,
    collect_records,
    mark_subject,
    take_case_id,
    take_space,
    take_text,
    take_texts,
)

NO_TARGET = "<|endoftext|>"  # published in place of a true target, which zsRE has none of
MARK = "nq question: "


def load_zsre(
    source: Source,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    target: str = "answer",
    language: str | None = None,
) -> Records:
    """zsRE records {subject, src, rephrase, answers, loc, loc_ans, ...} as CounterFact-like ones; case_id is the index,
    where the records have none.

    The result has requested_rewrite, paraphrase_prompts [rephrase], neighborhood_prompts [{prompt: loc + "?", target:
    loc_ans}], empty attribute_prompts and generation_prompts. The published neighbourhood has one prompt per token of
    the answer, which takes a tokenizer: with ids of " " + target, the i-th prompt is `prompt` + decode(ids[:i]) and its
    target is decode(ids[i]). `loc` keeps its "nq question: ", as published; one without it (translated zsRE) is a
    question as it stands, and gets no "?". `rephrase`, and `loc` with `loc_ans`, may be absent.

    target: "answer" edits to the first of `answers`, as in the papers of ROME and MEMIT; "alt" to the false `alt`, as
        EasyEdit does. A record without `answers` has its `alt` alone.
    language: of records that are there in several, {"en": {...}, "zh": {...}} (Bi-ZsRE, MzsRE): which to take.
    portability_prompts [{prompt, target}] come from `portability` ("New Question", "New Answer") of those records whose
        new target is `alt`: the question presupposes it ("..., which was established in 2006?").
    skip_bad, limit, `space` of a record: as in `load_counterfact`. Records that this made are checked again.

    Raises ValueError for records that lack a key, have something empty or of another type than text (`answers`: a list
    of texts), or whose `src` does not have the subject exactly once.
    """
    if target not in ("answer", "alt"):
        raise ValueError(f"unknown target '{target}': expected 'answer' or 'alt'")
    convert = partial(_convert, target=target, language=language)
    return collect_records(source, convert, skip_bad=skip_bad, limit=limit)


def _convert(index: int, record: Mapping[str, Any], target: str, language: str | None) -> Record:
    if "requested_rewrite" in record:
        return _check_converted(record)
    case_id = take_case_id(record) if "case_id" in record else index
    if translations := _translations(record):
        record = _translation(translations, language)
    subject = take_text(record, "subject")
    alone = "alt" in record and "answers" not in record
    new = take_text(record, "alt") if target == "alt" or alone else take_texts(record, "answers")[0]
    converted = {
        "case_id": case_id,
        "requested_rewrite": {
            "prompt": mark_subject(take_text(record, "src"), subject, "src"),
            "subject": subject,
            "target_new": {"str": new},
            "target_true": {"str": NO_TARGET},
            **take_space(record),
        },
        "paraphrase_prompts": [take_text(record, "rephrase")] if record.get("rephrase") is not None else [],
        "neighborhood_prompts": _neighbours(record),
        "attribute_prompts": [],
        "generation_prompts": [],
    }
    if "portability" in record and record.get("alt", new) == new:
        converted["portability_prompts"] = [_portability(record["portability"])]
    return converted


def _translations(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """By language, of a record that is there in several."""
    return {key: value for key, value in record.items() if isinstance(value, Mapping) and "src" in value}


def _translation(translations: Mapping[str, Mapping[str, Any]], language: str | None) -> Mapping[str, Any]:
    if language not in translations:
        wanted = "say which language to take" if language is None else f"there is no {quoted(language)}"
        raise Problem("", f"is there in {', '.join(translations)}: {wanted}")
    return translations[language]


def _neighbours(record: Mapping[str, Any]) -> list[dict[str, str]]:
    if record.get("loc") is None and record.get("loc_ans") is None:
        return []
    loc = take_text(record, "loc")
    return [{"prompt": f"{loc}?" if MARK in loc else loc, "target": take_text(record, "loc_ans")}]


def _portability(portability: Any) -> Record:
    if not isinstance(portability, Mapping):
        raise Problem("portability", f"is {brief(portability)}, expected an object with a question and an answer")
    return {
        "prompt": take_text(portability, "New Question", "portability."),
        "target": take_text(portability, "New Answer", "portability."),
    }


def _check_converted(record: Mapping[str, Any]) -> Record:
    """A record that this loader made."""
    take_case_id(record)
    check_rewrite(record, ("target_new", "target_true"))
    take_texts(record, "paraphrase_prompts", least=0)
    for key in ("neighborhood_prompts", *EXTRAS):
        check_pairs(record, key)
    return dict(record)


def ask(
    model: EditableModel, record: Mapping[str, Any], edit: int, attributes: bool = False, compat: str | None = None
) -> Asked:
    """{sort}_correct: right or wrong for each token of the answers, prompt after prompt. `attributes`: zsRE has none.

    Answers are tokenised with their prompt and asked in one pass. compat="reference": as published, each token is asked
    behind the text of those before it, tokenised anew; a token that is no whole character is wrong there.
    """
    rewrite = record["requested_rewrite"]
    new, space = rewrite["target_new"]["str"], rewrite.get("space")
    pairs_of = {
        "rewrite_prompts": [(filled(rewrite), new)],
        "paraphrase_prompts": [(text, new) for text in record.get("paraphrase_prompts", ())],
        "neighborhood_prompts": [(x["prompt"], x["target"]) for x in record.get("neighborhood_prompts", ())],
    }
    asked = {sort: [(text, spaced(answer, text, space)) for text, answer in pairs] for sort, pairs in pairs_of.items()}
    cut = _by_texts if compat == "reference" else lambda _, text, answer, number: [Question(text, (answer,), number)]
    by_sort = {sort: [q for pair in pairs for q in cut(model, *pair, edit)] for sort, pairs in asked.items()}

    def read(scores: Scores, before: Scores | None = None) -> dict[str, Any]:
        left = iter(scores)
        measures: dict[str, Any] = {}
        for sort, questions in by_sort.items():
            measures[f"{sort}_correct"] = [right for _ in questions for right in next(left)[0].right]
        return measures

    return [question for questions in by_sort.values() for question in questions], read


def _by_texts(model: EditableModel, text: str, answer: str, edit: int) -> list[TokenizedQuestion]:
    tokenizer = model.tokenizer
    tokens = encode_part(model, answer)
    questions = []
    for n, token in enumerate(tokens):
        ids = tuple(encode(model, text + tokenizer.decode(tokens[:n]))[0])
        first = (encode_part(model, tokenizer.decode([token])) or [token])[0]
        questions.append(TokenizedQuestion(ids, ((*ids, first),), (len(ids),), edit))
    return questions


def _detect(record: Mapping[str, Any]) -> bool:
    rewrite = record.get("requested_rewrite")
    true = rewrite.get("target_true") if isinstance(rewrite, Mapping) else None
    return "src" in record or bool(_translations(record)) or true == {"str": NO_TARGET}


DATASET = Dataset("zsre", _detect, load_zsre, ask)
